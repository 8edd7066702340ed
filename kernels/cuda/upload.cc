#include "kernels/cuda/upload.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "kernels/base/dtype.h"
#include "kernels/base/fixed_point.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/device_weight.h"

namespace rwkv::kernels::cuda {
namespace {

constexpr int64_t kStagingBytes = 8 << 20;

// The matrix that the device computes with in place of ggml's blocks: its shape and storage, no memory.
MatrixView WithoutBlocks(const MatrixView& matrix) {
  if (matrix.quantization != Quantization::kBlocks) return matrix;
  MatrixView view = {DType::kFloat32, matrix.rows, matrix.cols};
  if (FixedPointGroup(matrix) == 0) return view;
  view.dtype = DType::kFloat16;
  view.group = BlockWeights(matrix.blocks);
  view.quantization = Quantization::kInt8;
  return view;
}

}  // namespace

absl::StatusOr<Weight> Uploader::Load(const MatrixView& matrix) {
  RWKV_RETURN_IF_ERROR(CheckMatrix("weight", matrix));
  Weight weight;
  MatrixView& view = weight.matrix;
  view = WithoutBlocks(matrix);
  const bool blocks = matrix.quantization == Quantization::kBlocks;
  const bool has_minimums = !blocks && matrix.minimums != nullptr;
  const int64_t pitch = PitchOf(view);
  const int64_t group_bytes = GroupsPerRow(view) * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t data_bytes = pitch * view.rows;
  const int64_t scale_bytes = group_bytes * view.rows;
  RWKV_ASSIGN_OR_RETURN(weight.packed, device_.Allocate(data_bytes + scale_bytes + (has_minimums ? scale_bytes : 0),
                                                        MemoryKind::kDevice));
  char* const data = weight.packed.as<char>();
  view.data = data;
  absl::MutexLock lock(&mu_);
  const int64_t row_bytes = RowBytes(matrix);
  const int64_t block_count = blocks ? matrix.cols / BlockWeights(matrix.blocks) : 0;
  const char* const from = static_cast<const char*>(matrix.data);
  const auto decode = [&](BlockPart part) {
    return [&, part](int64_t row, char* to) {
      DecodeBlocks(matrix.blocks, part, reinterpret_cast<const uint8_t*>(from + row * row_bytes), block_count,
                   reinterpret_cast<uint8_t*>(to));
    };
  };
  const auto copy = [](const void* memory, int64_t bytes) {
    return [=](int64_t row, char* to) {
      std::memcpy(to, static_cast<const char*>(memory) + row * bytes, static_cast<size_t>(bytes));
    };
  };
  if (blocks) {
    const BlockPart part = FixedPointGroup(matrix) != 0 ? BlockPart::kQuants : BlockPart::kWeights;
    RWKV_RETURN_IF_ERROR(CopyRows(view.rows, pitch, data, decode(part)));
  } else {
    RWKV_RETURN_IF_ERROR(CopyRows(view.rows, pitch, data, copy(from, row_bytes)));
  }
  if (group_bytes == 0) return weight;
  char* const scales = data + data_bytes;
  view.scales = reinterpret_cast<const uint16_t*>(scales);
  view.minimums = has_minimums ? reinterpret_cast<const uint16_t*>(scales + scale_bytes) : nullptr;
  if (blocks) {
    RWKV_RETURN_IF_ERROR(CopyRows(view.rows, group_bytes, scales, decode(BlockPart::kScales)));
  } else {
    RWKV_RETURN_IF_ERROR(CopyRows(view.rows, group_bytes, scales, copy(matrix.scales, group_bytes)));
    if (!has_minimums) return weight;
    RWKV_RETURN_IF_ERROR(CopyRows(view.rows, group_bytes, scales + scale_bytes, copy(matrix.minimums, group_bytes)));
  }
  return weight;
}

absl::Status Uploader::CopyRows(int64_t rows, int64_t pitch, char* to,
                                const std::function<void(int64_t, char*)>& fill) {
  if (stream_ == nullptr) {
    RWKV_ASSIGN_OR_RETURN(stream_, device_.NewStream());
  }
  if (staging_.size_in_bytes() < pitch) {
    RWKV_ASSIGN_OR_RETURN(staging_, device_.Allocate(std::max(kStagingBytes, pitch), MemoryKind::kPinned));
  }
  const int64_t batch = staging_.size_in_bytes() / pitch;
  for (int64_t begin = 0; begin < rows; begin += batch) {
    const int64_t count = std::min(batch, rows - begin);
    char* const staged = staging_.as<char>();
    std::memset(staged, 0, static_cast<size_t>(count * pitch));
    for (int64_t row = 0; row < count; ++row) fill(begin + row, staged + row * pitch);
    RWKV_RETURN_IF_ERROR(stream_->Copy(to + begin * pitch, staged, count * pitch));
    RWKV_RETURN_IF_ERROR(stream_->Synchronize());
  }
  return absl::OkStatus();
}

}  // namespace rwkv::kernels::cuda
