// The cores of the time mixes: recurrence and what belongs to it, per head. Only for the kernels_*.cc files.
#pragma once

#include <cstdint>

#include "kernels/api/sequence_span.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/cpu/mix_kernels.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/cpu/weight_rows.h"

namespace rwkv::kernels::cpu {
namespace {

// --- RWKV-4 ---

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

void Wkv4(const Wkv4Args& args, const SequenceSpan& span, int64_t begin, int64_t end) {
  const int64_t last_row = span.row_begin + span.row_count;
  if (span.slot == kPaddingSlot) {
    for (int64_t row = span.row_begin; row < last_row; ++row)
      ZeroFloats(args.y + row * args.width + begin, end - begin);
    return;
  }
  for (int64_t c = begin; c < end; c += kLanes) {  // The states of 16 channels stay in registers for all tokens.
    const int64_t left = end - c;
    float* const aa_state = StateOf(args.aa, span.slot) + c;
    float* const bb_state = StateOf(args.bb, span.slot) + c;
    float* const pp_state = StateOf(args.pp, span.slot) + c;
    F32 aa = LoadSome(aa_state, left);
    F32 bb = LoadSome(bb_state, left);
    F32 pp = LoadSome(pp_state, left);
    const F32 decay = LoadSome(args.decay + c, left);
    const F32 bonus = LoadSome(args.bonus + c, left);
    for (int64_t row = span.row_begin; row < last_row; ++row) {
      const int64_t at = row * args.width + c;
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

// sum_j r[j] * k[j] * bonus[j]
RWKV_INLINE float BonusOf(const float* r, const float* k, const float* bonus, int64_t n) {
  F32 sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    sum = Fma(LoadSome(r + j, n - j) * LoadSome(k + j, n - j), LoadSome(bonus + j, n - j), sum);
  }
  return Sum(sum);
}

// --- RWKV-5 and 6 ---

// One head's vectors of one token.
struct Wkv6Token {
  const float* r;
  const float* w;
  const float* k;
  const float* v;
  float bonus;
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
  if constexpr (kRows == kLanes) {
    Store(token.y + i, Sum16(sums) + token.bonus * Load(token.v + i));
  } else {
    for (int q = 0; q < kRows; ++q) token.y[i + q] = Sum(sums[q]) + token.bonus * token.v[i + q];
  }
}

template <int64_t kHeadSize>
RWKV_INLINE void Wkv6Of(const Wkv6Args& args, const SequenceSpan& span, int64_t head) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : args.head_size;
  const int64_t c = head * n;
  for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
    const int64_t at = row * args.heads * n + c;
    if (span.slot == kPaddingSlot) {
      ZeroFloats(args.y + at, n);
      continue;
    }
    float* const state = StateOf(args.state, span.slot) + c * n;
    const Wkv6Token token = {args.r + at,
                             args.w + (args.constant_decay ? c : at),
                             args.k + at,
                             args.v + at,
                             BonusOf(args.r + at, args.k + at, args.bonus + c, n),
                             args.y + at};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) Wkv6Rows<kLanes, kHeadSize>(token, n, i, state + i * n);
    for (; i < n; ++i) Wkv6Rows<1, kHeadSize>(token, n, i, state + i * n);
    Normalize(token.y, args.ln_weight + c, args.ln_bias + c, n, args.epsilon,
              args.gate != nullptr ? args.gate + at : nullptr, token.y);
  }
}

void Wkv6(const Wkv6Args& args, const SequenceSpan& span, int64_t head) {
  if (args.head_size == 64) return Wkv6Of<64>(args, span, head);
  return Wkv6Of<0>(args, span, head);
}

// --- RWKV-7 ---

// One head's vectors of one token, as the recurrence takes them.
struct Wkv7Token {
  const float* r;
  float* w;
  float* k;
  float* v;
  float* a;
  float* b;
  float* y;
};

int64_t Wkv7ScratchFloats(int64_t head_size) { return 5 * RoundUpToLanes(head_size); }

// From the products to the token's vectors, which are in `scratch`.
RWKV_INLINE Wkv7Token Wkv7Prepare(const Wkv7Args& args, int64_t n, int64_t c, int64_t at, float* scratch) {
  constexpr float kInverseSqrtE = 0.60653066f;  // e^(-1/2)
  const int64_t step = RoundUpToLanes(n);
  const Wkv7Token token = {args.r + at,        scratch,    scratch + step, scratch + 2 * step, scratch + 3 * step,
                           scratch + 4 * step, args.y + at};
  F32 squares = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 kappa = LoadSome(args.k + at + j, n - j) * LoadSome(args.k_k + c + j, n - j);
    squares = Fma(kappa, kappa, squares);
  }
  const float length = __builtin_sqrtf(Sum(squares));
  const F32 norm = Broadcast(length < 1e-12f ? 1e-12f : length);
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t left = n - j;
    const F32 decay = Sigmoid(LoadSome(args.decay_bias + c + j, left) + LoadSome(args.decay_lora + at + j, left));
    const F32 iclr = Sigmoid(LoadSome(args.iclr_bias + c + j, left) + LoadSome(args.iclr_lora + at + j, left));
    const F32 k = LoadSome(args.k + at + j, left);
    const F32 kappa_hat = k * LoadSome(args.k_k + c + j, left) / norm;
    F32 v = LoadSome(args.v + at + j, left);
    if (args.v_first != nullptr) {
      const F32 gate =
          Sigmoid(LoadSome(args.value_gate_bias + c + j, left) + LoadSome(args.value_gate_lora + at + j, left));
      v = Fma(LoadSome(args.v_first + at + j, left) - v, gate, v);
    }
    Store(token.w + j, Exp(decay * -kInverseSqrtE));
    Store(token.k + j, k * Fma(iclr - 1.0f, LoadSome(args.k_a + c + j, left), Broadcast(1.0f)));
    Store(token.v + j, v);
    Store(token.a + j, -kappa_hat);
    Store(token.b + j, kappa_hat * iclr);
  }
  return token;
}

// kRows rows of one head's state for one token. kHeadSize: the head size when it is known at compile time, else 0.
// With kAhead the rows behind them are on their way meanwhile: a state that comes from memory is read at its speed.
template <int kRows, int64_t kHeadSize, bool kAhead>
RWKV_INLINE void Wkv7Rows(const Wkv7Token& token, int64_t head_size, int64_t i, float* state) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : head_size;
  F32 sums[kRows] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 a = LoadSome(token.a + j, n - j);
    for (int q = 0; q < kRows; ++q) {
      sums[q] = Fma(LoadSome(state + q * n + j, n - j), a, sums[q]);
    }
  }
  alignas(64) float recall[kRows];
  if constexpr (kRows == kLanes) {
    Store(recall, Sum16(sums));
  } else {
    for (int q = 0; q < kRows; ++q) recall[q] = Sum(sums[q]);
  }
  for (int q = 0; q < kRows; ++q) sums[q] = F32{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 r = LoadSome(token.r + j, n - j);
    const F32 w = LoadSome(token.w + j, n - j);
    const F32 k = LoadSome(token.k + j, n - j);
    const F32 b = LoadSome(token.b + j, n - j);
    for (int q = 0; q < kRows; ++q) {
      if (kAhead) __builtin_prefetch(state + (q + kRows) * n + j, 1);  // Spread over the arithmetic.
      F32 s = LoadSome(state + q * n + j, n - j) * w;
      s = Fma(Broadcast(token.v[i + q]), k, s);
      s = Fma(Broadcast(recall[q]), b, s);
      StoreSome(state + q * n + j, s, n - j);
      sums[q] = Fma(s, r, sums[q]);
    }
  }
  if constexpr (kRows == kLanes) {
    Store(token.y + i, Sum16(sums));
  } else {
    for (int q = 0; q < kRows; ++q) token.y[i + q] = Sum(sums[q]);
  }
}

template <int64_t kHeadSize, bool kAhead>
RWKV_INLINE void Wkv7Recur(const Wkv7Token& token, int64_t n, float* state) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Wkv7Rows<kLanes, kHeadSize, kAhead>(token, n, i, state + i * n);
  for (; i < n; ++i) Wkv7Rows<1, kHeadSize, false>(token, n, i, state + i * n);
}

template <int64_t kHeadSize>
RWKV_INLINE void Wkv7Of(const Wkv7Args& args, const SequenceSpan& span, int64_t head, float* scratch) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : args.head_size;
  const int64_t c = head * n;
  for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
    const int64_t at = row * args.heads * n + c;
    if (span.slot == kPaddingSlot) {
      ZeroFloats(args.y + at, n);
      continue;
    }
    float* const state = StateOf(args.state, span.slot) + c * n;
    const Wkv7Token token = Wkv7Prepare(args, n, c, at, scratch);
    if (row == span.row_begin) {  // Later the head's state is in the first-level cache.
      Wkv7Recur<kHeadSize, true>(token, n, state);
    } else {
      Wkv7Recur<kHeadSize, false>(token, n, state);
    }
    Normalize(token.y, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, nullptr, token.y);
    const F32 bonus = Broadcast(BonusOf(token.r, token.k, args.bonus + c, n));
    for (int64_t j = 0; j < n; j += kLanes) {
      const F32 z = Fma(bonus, LoadSome(token.v + j, n - j), LoadSome(token.y + j, n - j));
      StoreSome(token.y + j, z * LoadSome(args.g + at + j, n - j), n - j);
    }
  }
}

void Wkv7(const Wkv7Args& args, const SequenceSpan& span, int64_t head, float* scratch) {
  if (args.head_size == 64) return Wkv7Of<64>(args, span, head, scratch);
  return Wkv7Of<0>(args, span, head, scratch);
}

}  // namespace
}  // namespace rwkv::kernels::cpu
