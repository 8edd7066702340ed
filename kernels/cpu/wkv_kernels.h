// The recurrences of the time mixes. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/api/sequence_span.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"
#include "kernels/cpu/mix_kernels.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"

namespace rwkv::kernels::cpu {
namespace {

// --- RWKV-4 time mix ---

// Of exp(a - max(a, b)) and exp(b - max(a, b)) one is 1, and one exp() makes the other.
struct Scales {
  F32 a;
  F32 b;
};
RWKV_INLINE Scales ScalesOf(F32 a, F32 b) {
  const F32 smaller = Exp(-Abs(a - b));
  const I32 a_is_larger = a > b;
  return {Select(a_is_larger, Broadcast(1.0f), smaller), Select(a_is_larger, smaller, Broadcast(1.0f))};
}

void Wkv4(const Wkv4Args& args) {
  const int64_t width = args.width;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    for (int64_t c = 0; c < width; c += kLanes) {  // The states of 16 channels stay in registers for all tokens.
      const int64_t left = width - c;
      float* const aa_state = args.aa.data + span.slot * args.aa.stride + c;
      float* const bb_state = args.bb.data + span.slot * args.bb.stride + c;
      float* const pp_state = args.pp.data + span.slot * args.pp.stride + c;
      F32 aa = LoadSome(aa_state, left);
      F32 bb = LoadSome(bb_state, left);
      F32 pp = LoadSome(pp_state, left);
      const F32 decay = LoadSome(args.decay + c, left);
      const F32 bonus = LoadSome(args.bonus + c, left);
      for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
        const int64_t at = row * width + c;
        const F32 k = LoadSome(args.k + at, left);
        const F32 v = LoadSome(args.v + at, left);
        const Scales read = ScalesOf(pp, bonus + k);
        const F32 wkv = Fma(read.a, aa, read.b * v) / Fma(read.a, bb, read.b);
        StoreSome(args.y + at, LoadSome(args.r + at, left) * wkv, left);
        const F32 decayed = pp + decay;
        const Scales write = ScalesOf(decayed, k);
        aa = Fma(write.a, aa, write.b * v);
        bb = Fma(write.a, bb, write.b);
        pp = Select(decayed > k, decayed, k);
      }
      StoreSome(aa_state, aa, left);
      StoreSome(bb_state, bb, left);
      StoreSome(pp_state, pp, left);
    }
  }
}

// --- RWKV-5 and 6 time mix ---

// One head's vectors of one token.
struct Wkv6Token {
  const float* r;
  const float* w;
  const float* k;
  const float* v;
  float bonus;  // sum_j r[j] * k[j] * bonus[j]
  float* y;
};

// kRows rows of one head's state for one token. kHeadSize: the head size when it is known at compile time, else 0.
template <int kRows, int64_t kHeadSize>
RWKV_INLINE void Wkv6Rows(const Wkv6Token& token, int64_t head_size, int64_t i, float* state) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : head_size;
  F32 sums[kRows] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 r = LoadSome(token.r + j, n - j);
    const F32 w = LoadSome(token.w + j, n - j);
    const F32 k = LoadSome(token.k + j, n - j);
    for (int q = 0; q < kRows; ++q) {
      const F32 s = LoadSome(state + q * n + j, n - j);
      sums[q] = Fma(s, r, sums[q]);
      StoreSome(state + q * n + j, Fma(Broadcast(token.v[i + q]), k, s * w), n - j);
    }
  }
  for (int q = 0; q < kRows; ++q) token.y[i + q] = Sum(sums[q]) + token.bonus * token.v[i + q];
}

template <int64_t kHeadSize>
void Wkv6Of(const Wkv6Args& args) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : args.head_size;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    for (int64_t head = 0; head < args.heads; ++head) {  // A head's state stays in the first-level cache, as in Wkv7Of.
      const int64_t c = head * n;
      float* const state = args.state_pool + span.slot * args.state_stride + c * n;
      for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
        const int64_t at = row * args.heads * n + c;
        F32 bonus = {};
        for (int64_t j = 0; j < n; j += kLanes) {
          bonus = Fma(LoadSome(args.r + at + j, n - j) * LoadSome(args.k + at + j, n - j),
                      LoadSome(args.bonus + c + j, n - j), bonus);
        }
        const Wkv6Token token = {
            args.r + at, args.w + (args.constant_decay ? c : at), args.k + at, args.v + at, Sum(bonus), args.y + at};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) Wkv6Rows<4, kHeadSize>(token, n, i, state + i * n);
        for (; i < n; ++i) Wkv6Rows<1, kHeadSize>(token, n, i, state + i * n);
      }
    }
  }
}

void Wkv6(const Wkv6Args& args) {
  if (args.head_size == 64) return Wkv6Of<64>(args);
  return Wkv6Of<0>(args);
}

// --- RWKV-7 time mix ---

void Wkv7Prepare(const Wkv7PrepareArgs& args) {
  const int64_t n = args.head_size;
  const int64_t width = args.heads * n;
  constexpr float kInverseSqrtE = 0.60653066f;  // e^(-1/2)
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      F32 squares = {};
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t c = head * n + j;
        const F32 kappa = LoadSome(args.k + row * width + c, n - j) * LoadSome(args.k_k + c, n - j);
        squares = Fma(kappa, kappa, squares);
      }
      const float length = __builtin_sqrtf(Sum(squares));
      const F32 norm = Broadcast(length < 1e-12f ? 1e-12f : length);
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t left = n - j;
        const int64_t c = head * n + j;
        const int64_t at = row * width + c;
        const F32 decay =
            Exp(Sigmoid(LoadSome(args.decay_bias + c, left) + LoadSome(args.decay_lora + at, left)) * -kInverseSqrtE);
        const F32 iclr = Sigmoid(LoadSome(args.iclr_bias + c, left) + LoadSome(args.iclr_lora + at, left));
        const F32 k = LoadSome(args.k + at, left);
        const F32 kappa_hat = k * LoadSome(args.k_k + c, left) / norm;
        if (args.v_first != nullptr) {
          const F32 gate =
              Sigmoid(LoadSome(args.value_gate_bias + c, left) + LoadSome(args.value_gate_lora + at, left));
          const F32 v = LoadSome(args.v + at, left);
          StoreSome(args.v + at, Fma(LoadSome(args.v_first + at, left) - v, gate, v), left);
        }
        StoreSome(args.k + at, k * Fma(iclr - 1.0f, LoadSome(args.k_a + c, left), Broadcast(1.0f)), left);
        StoreSome(args.w + at, decay, left);
        StoreSome(args.a + at, -kappa_hat, left);
        StoreSome(args.b + at, kappa_hat * iclr, left);
      }
    }
  }
}

// One head's vectors of one token.
struct Wkv7Token {
  const float* r;
  const float* w;
  const float* k;
  const float* v;
  const float* a;
  const float* b;
  float* y;
};

// kRows rows of one head's state for one token. kHeadSize: the head size when it is known at compile time, else 0.
template <int kRows, int64_t kHeadSize>
RWKV_INLINE void Wkv7Rows(const Wkv7Token& token, int64_t head_size, int64_t i, float* state) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : head_size;
  F32 sums[kRows] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 a = LoadSome(token.a + j, n - j);
    for (int q = 0; q < kRows; ++q) sums[q] = Fma(LoadSome(state + q * n + j, n - j), a, sums[q]);
  }
  F32 recall[kRows];
  if constexpr (kRows == 4) {
    const F32x4 four = Sum4(sums[0], sums[1], sums[2], sums[3]);
    for (int q = 0; q < kRows; ++q) recall[q] = Broadcast(four[q]);
  } else {
    for (int q = 0; q < kRows; ++q) recall[q] = Broadcast(Sum(sums[q]));
  }
  for (int q = 0; q < kRows; ++q) sums[q] = F32{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 r = LoadSome(token.r + j, n - j);
    const F32 w = LoadSome(token.w + j, n - j);
    const F32 k = LoadSome(token.k + j, n - j);
    const F32 b = LoadSome(token.b + j, n - j);
    for (int q = 0; q < kRows; ++q) {
      F32 s = LoadSome(state + q * n + j, n - j) * w;
      s = Fma(Broadcast(token.v[i + q]), k, s);
      s = Fma(recall[q], b, s);
      StoreSome(state + q * n + j, s, n - j);
      sums[q] = Fma(s, r, sums[q]);
    }
  }
  if constexpr (kRows == 4) {
    const F32x4 four = Sum4(sums[0], sums[1], sums[2], sums[3]);
    for (int q = 0; q < kRows; ++q) token.y[i + q] = four[q];
  } else {
    for (int q = 0; q < kRows; ++q) token.y[i + q] = Sum(sums[q]);
  }
}

template <int64_t kHeadSize>
void Wkv7Of(const Wkv7Args& args) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : args.head_size;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    // A head's state stays in the first-level cache for all tokens.
    for (int64_t head = 0; head < args.heads; ++head) {
      float* const state = args.state_pool + span.slot * args.state_stride + head * n * n;
      for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
        const int64_t at = (row * args.heads + head) * n;
        const Wkv7Token token = {args.r + at, args.w + at, args.k + at, args.v + at,
                                 args.a + at, args.b + at, args.y + at};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) Wkv7Rows<4, kHeadSize>(token, n, i, state + i * n);
        for (; i < n; ++i) Wkv7Rows<1, kHeadSize>(token, n, i, state + i * n);
      }
    }
  }
}

void Wkv7(const Wkv7Args& args) {
  if (args.head_size == 64) return Wkv7Of<64>(args);
  return Wkv7Of<0>(args);
}

void Wkv7Output(const Wkv7OutputArgs& args) {
  const int64_t n = args.head_size;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t at = (row * args.heads + head) * n;
      const int64_t c = head * n;
      Normalize(args.y + at, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, nullptr, args.out + at);
      F32 sum = {};
      for (int64_t j = 0; j < n; j += kLanes) {
        sum = Fma(LoadSome(args.r + at + j, n - j) * LoadSome(args.k + at + j, n - j),
                  LoadSome(args.bonus + c + j, n - j), sum);
      }
      const F32 bonus = Broadcast(Sum(sum));
      for (int64_t j = 0; j < n; j += kLanes) {
        const F32 z = Fma(bonus, LoadSome(args.v + at + j, n - j), LoadSome(args.out + at + j, n - j));
        StoreSome(args.out + at + j, z * LoadSome(args.g + at + j, n - j), n - j);
      }
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
