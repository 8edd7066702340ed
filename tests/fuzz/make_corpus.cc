// Writes the seeds of the fuzz targets: make_corpus tests/fuzz/corpus
#include <sys/stat.h>

#include <iostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"

namespace rwkv::testing {
namespace {

using checkpoint::ElementType;

RandomModelOptions SmallestModel(kernels::DType dtype) {
  RandomModelOptions options;
  options.layers = 2;
  options.width = 4;
  options.head_size = 2;
  options.ffn_width = 3;
  options.vocab_size = 3;
  options.decay_rank = options.iclr_rank = options.value_residual_rank = options.gate_rank = 1;
  options.dtype = dtype;
  options.time_state = true;
  return options;
}

std::vector<RawTensor> FewTensors() {
  return {{{"a", checkpoint::ElementType::kFloat32, {2, 3}}, std::string(24, 'a')},
          {{"b", checkpoint::ElementType::kBFloat16, {1, 1, 4}}, std::string(8, 'b')},
          {{"c", checkpoint::ElementType::kInt64, {}}, std::string(8, 'c')},
          {{"d", checkpoint::ElementType::kUint8, {0, 3}}, ""}};
}

absl::Status WriteAll(const std::string& root) {
  const auto write = [&root](const std::string& folder, const std::string& name, const std::string& bytes) {
    mkdir(absl::StrCat(root, "/", folder).c_str(), 0755);
    return WriteFileAtomically(absl::StrCat(root, "/", folder, "/", name), bytes);
  };
  const std::vector<RawTensor> few = FewTensors();
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> model, MakeRandomModel(SmallestModel(kernels::DType::kBFloat16)));
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> wide, MakeRandomModel(SmallestModel(kernels::DType::kFloat32)));
  std::vector<TensorSpec> specs;
  for (const RawTensor& tensor : few) specs.push_back(tensor.spec);

  RWKV_RETURN_IF_ERROR(write("safetensors", "empty", SafetensorsBytes({})));
  RWKV_RETURN_IF_ERROR(write("safetensors", "few", SafetensorsBytes(few)));
  RWKV_RETURN_IF_ERROR(write("safetensors", "metadata", SafetensorsBytes(few, {{"format", "pt"}, {"a", "\"b\""}})));
  RWKV_RETURN_IF_ERROR(write("safetensors", "model", SafetensorsBytes(model)));

  RWKV_RETURN_IF_ERROR(write("torch_file", "zip", TorchZipBytes(few)));
  RWKV_RETURN_IF_ERROR(write("torch_file", "legacy", TorchLegacyBytes(few)));
  RWKV_RETURN_IF_ERROR(
      write("torch_file", "zip32",
            ZipBytes(std::vector<ZipEntry>{{"x/data.pkl", StateDictPickle({})}}, ZipOptions{false, false})));
  RWKV_RETURN_IF_ERROR(write("torch_file", "model", TorchZipBytes(model)));

  RWKV_RETURN_IF_ERROR(write("pickle", "few", StateDictPickle(specs)));
  RWKV_RETURN_IF_ERROR(write("pickle", "empty", StateDictPickle({})));
  RWKV_RETURN_IF_ERROR(
      write("pickle", "protocol4",
            std::string("\x80\x04\x95\x0e\0\0\0\0\0\0\0}\x94(\x8c\1aK\1\x8c\1b]\x94(K\2K\3e\x8c\1cNu.", 37)));
  RWKV_RETURN_IF_ERROR(write("pickle", "code",
                             std::string("\x80\x02"
                                         "cos\nsystem\nX\2\0\0\0id\x85R.",
                                         25)));
  RWKV_RETURN_IF_ERROR(write("pickle", "itself", std::string("\x80\x02}q\0(X\1\0\0\0ah\0X\1\0\0\0bh\0u.", 24)));

  RWKV_RETURN_IF_ERROR(write("checkpoint", "few.safetensors", SafetensorsBytes(few)));
  RWKV_RETURN_IF_ERROR(write("checkpoint", "model.safetensors", SafetensorsBytes(model)));
  RWKV_RETURN_IF_ERROR(write("checkpoint", "model_fp32.pth", TorchZipBytes(wide)));
  RWKV_RETURN_IF_ERROR(write("checkpoint", "model_legacy.pth", TorchLegacyBytes(model)));
  return absl::OkStatus();
}

}  // namespace
}  // namespace rwkv::testing

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "make_corpus DIR\n";
    return 2;
  }
  if (const absl::Status status = rwkv::testing::WriteAll(argv[1]); !status.ok()) {
    std::cerr << "make_corpus: " << status << "\n";
    return 1;
  }
  return 0;
}
