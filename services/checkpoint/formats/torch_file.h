// PyTorch checkpoints (.pth): a pickled dict of tensors and the raw bytes of their storages, in one of two containers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

bool LooksLikeTorchZip(absl::Span<const uint8_t> file);
bool LooksLikeTorchLegacy(absl::Span<const uint8_t> file);

// torch >= 1.6: a zip archive of X/data.pkl and X/data/<key>. Touches its directory and the pickle only. (Archives with
// compressed members: see inflated_zip.h first.)
struct TorchDirectory {
  std::vector<TensorRecord> tensors;
  std::vector<std::string> skipped;  // Classes of objects beside the tensors, which were not made: Pickle::opaque().
};
absl::StatusOr<TorchDirectory> ReadTorchZip(absl::Span<const uint8_t> file, DoneWith done = KeepAll);

// torch < 1.6: five pickles back to back, then each storage as an int64 element count and its bytes.
absl::StatusOr<TorchDirectory> ReadTorchLegacy(absl::Span<const uint8_t> file, DoneWith done = KeepAll);

// Both:
//   kDataLoss: the file is cut. kUnimplemented: big-endian, compressed.
//   kInvalidArgument: code in the pickle, a storage missing or of another size, a tensor that reaches out of its
//   storage, repeats elements of it, or walks backwards; named.

}  // namespace rwkv::checkpoint
