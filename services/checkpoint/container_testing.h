// Files of a few tensors, and what is in a checkpoint, whatever container it came in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {

inline constexpr char kTestdata[] = "services/checkpoint/testdata/";

inline std::string WriteTemporary(const std::string& name, const std::string& bytes) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  EXPECT_OK(testing::WriteFileAtomically(path, bytes));
  return path;
}

inline absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenBytes(const std::string& bytes) {
  return Checkpoint::Open(WriteTemporary("file", bytes));
}

inline std::vector<float> Floats(const Tensor& tensor) {
  if (tensor.blocks != BlockType::kNone) {
    std::vector<float> values(tensor.bytes / kernels::BlockBytes(tensor.blocks) * kernels::BlockWeights(tensor.blocks));
    kernels::DecodeBlocks(tensor.blocks, BlockPart::kWeights, static_cast<const uint8_t*>(tensor.data),
                          tensor.bytes / kernels::BlockBytes(tensor.blocks), reinterpret_cast<uint8_t*>(values.data()));
    return values;
  }
  std::vector<float> values(tensor.info->bytes / ElementSize(tensor.info->type));
  kernels::WidenToFloat(*WeightDType(tensor.info->type), tensor.data, static_cast<int64_t>(values.size()),
                        values.data());
  return values;
}

// A tensor's values, put together where it is a pair.
inline std::vector<float> Weights(const Checkpoint& checkpoint, const std::string& name) {
  const absl::StatusOr<Tensor> tensor = checkpoint.Read(name);
  if (!tensor.ok()) {
    ADD_FAILURE() << tensor.status();
    return {};
  }
  if (WeightDType(tensor->info->type).has_value()) return Floats(*tensor);
  const std::vector<float> scales = Floats(*checkpoint.Read(absl::StrCat(name, ".scale")));
  const bool is_int4 = tensor->info->type == ElementType::kUint8;
  const std::vector<float> minimums =
      is_int4 ? Floats(*checkpoint.Read(absl::StrCat(name, ".min"))) : std::vector<float>(scales.size());
  const uint8_t* quants = static_cast<const uint8_t*>(tensor->data);
  std::vector<float> out(tensor->info->bytes * (is_int4 ? 2 : 1));
  for (size_t i = 0; i < out.size(); ++i) {
    const int q = !is_int4 ? static_cast<int8_t>(quants[i]) : i % 2 == 0 ? quants[i / 2] & 15 : quants[i / 2] >> 4;
    const float product = static_cast<float>(q) * scales[i / 32];
    out[i] = product + minimums[i / 32];
  }
  return out;
}

inline std::vector<int64_t> WithoutUnits(std::vector<int64_t> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  return shape;
}

}  // namespace rwkv::checkpoint
