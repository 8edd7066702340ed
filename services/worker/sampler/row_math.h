// The passes of the sampler over a whole row, as wide as the CPU allows. Element i is always in lane i % 8 and every
// operation is IEEE double or float without contraction, so that the bits do not depend on the width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rwkv::worker {

// The largest of logits[0, n), -inf for n = 0; NaN if one of them is NaN or +inf.
float MaxLogit(const float* logits, size_t n);

// sum of exp(logits[i] - max). No logit is above max.
double SumExp(const float* logits, size_t n, double max);

// weights[i] = exp((logits[i] - max) / temperature) * 2^bits, rounded; bits <= 51.
void FixedPointExp(const float* logits, size_t n, double max, double temperature, int bits, uint64_t* weights);

}  // namespace rwkv::worker
