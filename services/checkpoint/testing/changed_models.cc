#include "services/checkpoint/testing/changed_models.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"

namespace rwkv::checkpoint {

using testing::RandomModelOptions;
using testing::RawTensor;

RandomModelOptions BaseOptions(ModelVersion version) {
  RandomModelOptions options;
  options.version = version;
  options.layers = 3;
  options.width = 32;
  options.head_size = 16;
  options.ffn_width = 48;
  options.vocab_size = 11;
  options.mix_rank = 4;
  options.decay_rank = 5;
  options.iclr_rank = 6;
  options.value_residual_rank = 7;
  options.gate_rank = 40;
  return options;
}

std::vector<RawTensor> BaseModel() { return *testing::MakeRandomModel(BaseOptions()); }

absl::StatusOr<ModelConfig> ConfigOf(const std::vector<RawTensor>& tensors) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/model.safetensors");
  std::ofstream(path, std::ios::binary) << testing::SafetensorsBytes(tensors);
  const auto checkpoint = Checkpoint::Open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  return ModelConfig::FromCheckpoint(**checkpoint);
}

RawTensor& Named(std::vector<RawTensor>* tensors, const std::string& name) {
  const auto found =
      std::find_if(tensors->begin(), tensors->end(), [&](const RawTensor& tensor) { return tensor.spec.name == name; });
  EXPECT_NE(found, tensors->end()) << name;
  return *found;
}

void Remove(std::vector<RawTensor>* tensors, const std::function<bool(const std::string&)>& is_unwanted) {
  const size_t before = tensors->size();
  tensors->erase(std::remove_if(tensors->begin(), tensors->end(),
                                [&](const RawTensor& tensor) { return is_unwanted(tensor.spec.name); }),
                 tensors->end());
  EXPECT_LT(tensors->size(), before);
}

void Reshape(RawTensor* tensor, std::vector<int64_t> shape) {
  tensor->spec.shape = std::move(shape);
  tensor->data.assign(testing::ElementsOf(tensor->spec) * ElementSize(tensor->spec.type), '\0');
}

RawTensor Zeros(const std::string& name, std::vector<int64_t> shape, ElementType type) {
  RawTensor tensor{{name, type, {}}, ""};
  Reshape(&tensor, std::move(shape));
  return tensor;
}

}  // namespace rwkv::checkpoint
