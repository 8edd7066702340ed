// int8 weights by their inputs instead of their outputs, so that a product with one row reads no weight of an input
// that is zero: behind a squared ReLU most are. The sums are exact and zeros add nothing, so no bit changes. Only for
// the kernels_*.cc files and pack_columns.cc.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"

namespace rwkv::kernels::cpu {
namespace {

// Where the packed matrix has what. Outputs are cut into blocks of 64; a block is the codes [inputs, up to whole
// groups][64], a cache line an input, then the scales [groups][64] as fp16. Zeros where the matrix has no weight.
struct Columns {
  static constexpr int64_t kOutputs = 64;

  explicit Columns(const MatrixView& matrix)
      : blocks((matrix.rows + kOutputs - 1) / kOutputs),
        groups((matrix.cols + matrix.group - 1) / matrix.group),
        inputs(groups * matrix.group) {}

  // Where in a line output 0 <= o < 64 of the block is: what interleaves the bytes of four lines within each 16 bytes
  // and then their pairs leaves the outputs in order.
  static int64_t place(int64_t o) { return o % 16 / 4 * 16 + o / 16 * 4 + o % 4; }

  // Bytes from the beginning.
  int64_t codes(int64_t block) const { return block * kOutputs * (inputs + 2 * groups); }
  int64_t scales(int64_t block) const { return codes(block) + inputs * kOutputs; }
  int64_t bytes() const { return codes(blocks); }

  int64_t blocks;
  int64_t groups;
  int64_t inputs;
};

}  // namespace
}  // namespace rwkv::kernels::cpu
