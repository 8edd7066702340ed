// The passes of the sampler over a whole row, as wide as the CPU allows. Sums are of whole numbers and every operation
// is IEEE double or float without contraction, so that the bits depend neither on the width nor on an order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rwkv::worker {

// The largest of logits[0, n), -inf for n = 0; NaN if one of them is NaN or +inf.
float MaxLogit(const float* logits, size_t n);

// sum of exp(logits[i] - max) * 2^bits, each rounded; no logit is above max, bits <= FixedPointBits(n).
uint64_t SumFixedPointExp(const float* logits, size_t n, double max, int bits);

// weights[i] = exp((logits[i] - max) / temperature) * 2^bits, rounded; bits <= 51.
void FixedPointExp(const float* logits, size_t n, double max, double temperature, int bits, uint64_t* weights);

// The three for one width.
struct RowPasses {
  const char* name;
  float (*max_logit)(const float* logits, size_t n);
  uint64_t (*sum_fixed_point_exp)(const float* logits, size_t n, double max, int bits);
  void (*fixed_point_exp)(const float* logits, size_t n, double max, double temperature, int bits, uint64_t* weights);
};

// Those that this processor runs, the plain one first. The functions above are of the last.
std::vector<RowPasses> RowPassesHere();

}  // namespace rwkv::worker
