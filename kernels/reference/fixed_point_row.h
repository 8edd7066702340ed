// One row of inputs in fixed point, and its products with weights of few bits, as products.h writes them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/base/matrix.h"

namespace rwkv::kernels::reference {

class FixedPointRow {
 public:
  // `weight`: one of FixedPointGroup(); x: [weight.cols].
  FixedPointRow(const MatrixView& weight, const float* x);

  // With output o of the weight.
  float Dot(const MatrixView& weight, int64_t o) const;

 private:
  int64_t group_;
  std::vector<int16_t> q_;
  std::vector<float> scales_;  // by group
};

}  // namespace rwkv::kernels::reference
