// Rows of weight matrices as floats, however the matrix stores them. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/base/ggml_blocks.h"
#include "kernels/base/matrix.h"
#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

constexpr int64_t RoundUpToLanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <typename Visit>
RWKV_INLINE void VisitBlocks(BlockType blocks, Visit visit) {
  switch (blocks) {
    case BlockType::kNone:
      return;
    case BlockType::kQ4_0:
      return visit(GgmlWeights<SmallBlock<false, false>>());
    case BlockType::kQ4_1:
      return visit(GgmlWeights<SmallBlock<true, false>>());
    case BlockType::kQ5_0:
      return visit(GgmlWeights<SmallBlock<false, true>>());
    case BlockType::kQ5_1:
      return visit(GgmlWeights<SmallBlock<true, true>>());
    case BlockType::kQ8_0:
      return visit(GgmlWeights<EightBitBlock>());
    case BlockType::kQ4_K:
      return visit(GgmlWeights<LargeBlock<false>>());
    case BlockType::kQ5_K:
      return visit(GgmlWeights<LargeBlock<true>>());
    case BlockType::kQ6_K:
      return visit(GgmlWeights<SixBitBlock>());
  }
}

// Calls visit(Weights()) with how the matrix stores its weights.
template <typename Visit>
RWKV_INLINE void VisitWeights(const MatrixView& matrix, Visit visit) {
  switch (matrix.quantization) {
    case Quantization::kNone:
      break;
    case Quantization::kInt8:
      return visit(Int8Weights());
    case Quantization::kInt4:
      return visit(Int4Weights());
    case Quantization::kBlocks:
      return VisitBlocks(matrix.blocks, visit);
  }
  switch (matrix.dtype) {
    case DType::kFloat32:
      return visit(Float32Weights());
    case DType::kBFloat16:
      return visit(BFloat16Weights());
    case DType::kFloat16:
      return visit(Float16Weights());
  }
}

// At most 16 of the `left` weights from `col`, a multiple of 16; the lanes behind them are zero.
template <typename Weights>
RWKV_INLINE F32 LoadSomeWeights(typename Weights::Row row, int64_t col, int64_t left) {
  const typename Weights::Group group = Weights::GroupOf(row, col);
  return left >= kLanes ? Weights::Load(row, group, col) : Weights::LoadTail(row, group, col, left);
}

// Row `row` of the matrix as floats.
template <typename Weights>
RWKV_INLINE void WidenRow(const MatrixView& matrix, int64_t row, float* to) {
  const typename Weights::Row weights = Weights::RowOf(matrix, row);
  for (int64_t k = 0; k < matrix.cols; k += kLanes) {
    StoreSome(to + k, LoadSomeWeights<Weights>(weights, k, matrix.cols - k), matrix.cols - k);
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
