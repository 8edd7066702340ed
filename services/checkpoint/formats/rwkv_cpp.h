// rwkv.cpp's .bin: a header of six numbers, then each tensor with its own header. Format: RWKV/rwkv.cpp
// docs/FILE_FORMAT.md.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

struct RwkvCppDirectory {
  int32_t vocab_size = 0;  // As the header says; nothing is checked against the tensors here.
  int32_t width = 0;
  int32_t layer_count = 0;
  std::vector<TensorRecord> tensors;  // In file order; shapes as PyTorch has them, [out, in].
};

// `file` is the whole file; the headers of the tensors lie between their bytes.
//   kDataLoss: the file ends inside a header or a tensor.
//   kUnimplemented: a version other than 100 and 101, or a block type that rwkv.cpp itself has given up.
//   kInvalidArgument: anything else that contradicts the format.
absl::StatusOr<RwkvCppDirectory> ReadRwkvCpp(absl::Span<const uint8_t> file, DoneWith done = KeepAll);

}  // namespace rwkv::checkpoint
