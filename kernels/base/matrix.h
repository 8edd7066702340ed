// A weight matrix that somebody else owns (a mapped checkpoint, as a rule).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"

namespace rwkv::kernels {

// Weights stored as small whole numbers, of which `group` neighbours in a row share a scale and a minimum:
//   weight = float(q * scale + minimum)        the product is exact, the sum is rounded once: the same float everywhere
enum class Quantization : uint8_t {
  kNone = 0,
  kInt8 = 1,    // q in [-128, 127]
  kInt4 = 2,    // q in [0, 15]
  kBlocks = 3,  // as ggml lays q, scales and minimums out: ggml_blocks.h
};

// "none", "int8", "int4", "blocks".
absl::string_view Name(Quantization quantization);

// Row-major without gaps, applied as y = W x: `rows` outputs of `cols` inputs each, as PyTorch stores a Linear.
// (RWKV's low-rank factors are stored [in, out]: whoever loads them transposes them.)
struct MatrixView {
  DType dtype = DType::kFloat32;  // of the weights; of int8's and int4's scales and minimums, which are fp16
  int64_t rows = 0;               // outputs
  int64_t cols = 0;               // inputs
  // rows * cols weights, aligned to one element (not more). kInt8: an int8_t each. kInt4: a row takes (cols + 1) / 2
  // bytes, the weight of an even column is in the low four bits. kBlocks: a row is whole blocks, aligned to nothing.
  const void* data = nullptr;

  Quantization quantization = Quantization::kNone;
  BlockType blocks = BlockType::kNone;  // kBlocks only

  // kInt8 and kInt4 only. A row has groups = ceil(cols / group) of them, the last one may be shorter.
  int64_t group = 0;                   // 32 (as in ggml) or 64: IsGroupSize()
  const uint16_t* scales = nullptr;    // [rows, groups]
  const uint16_t* minimums = nullptr;  // [rows, groups]; null in kInt8: zeros
};

inline bool IsGroupSize(int64_t group) { return group == 32 || group == 64; }

// Groups of one row, 0 if there are none.
inline int64_t GroupsPerRow(const MatrixView& matrix) {
  return matrix.group == 0 ? 0 : (matrix.cols + matrix.group - 1) / matrix.group;
}

// Bytes of one row of `data`.
int64_t RowBytes(const MatrixView& matrix);

// kInvalidArgument: sizes not in [1, 2^31), an unknown way to store weights, memory that is missing or not aligned;
// the message names the matrix by `name`.
absl::Status CheckMatrix(absl::string_view name, const MatrixView& matrix);

// Rows [begin, begin + rows) of a matrix, which must have them.
MatrixView RowsOf(const MatrixView& matrix, int64_t begin, int64_t rows);

// Of data, scales and minimums.
int64_t SizeInBytes(const MatrixView& matrix);

// One weight, exactly; 0 <= row < rows and 0 <= col < cols.
float LoadAsFloat(const MatrixView& matrix, int64_t row, int64_t col);

}  // namespace rwkv::kernels
