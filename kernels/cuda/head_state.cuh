// A head's wkv state in the registers of a block: four threads a row (value channel), each with kQuads times four key
// channels of it. With kWhole the head has 16 * kQuads channels and lies aligned in memory.
#pragma once

#include "kernels/api/state_tensor.h"
#include "kernels/cuda/rows.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kThreadsOfStateRow = 4;

template <int kQuads>
constexpr int kHeadThreads = 16 * kQuads* kThreadsOfStateRow;

inline uint32_t HeadThreads(int64_t head_size) {
  return static_cast<uint32_t>((kThreadsOfStateRow * head_size + kWarpThreads - 1) / kWarpThreads) * kWarpThreads;
}

template <int kQuads, bool kWhole>
struct HeadState {
  static constexpr int kPart = 4 * kQuads;  // elements of a thread

  RWKV_DEVICE HeadState(int head_size, bool is_half)
      : n(kWhole ? 16 * kQuads : head_size),
        half(is_half),
        row(ThreadIndex() / kThreadsOfStateRow),
        part(ThreadIndex() % kThreadsOfStateRow) {}

  // The key channel of an element.
  RWKV_DEVICE int Key(int e) const { return 4 * (part + kThreadsOfStateRow * (e / 4)) + e % 4; }
  RWKV_DEVICE bool Has(int e) const { return kWhole || (row < n && Key(e) < n); }

  RWKV_DEVICE void Load(const StateTensor& state, int32_t slot, int head) {
    const int64_t at = Place(state, slot, head);
    const float* const floats = state.data;
    const auto* const halves = reinterpret_cast<const uint16_t*>(state.data);
#pragma unroll
    for (int e = 0; e < kPart; e += 4) {
      const int64_t quad = at + row * n + Key(e);
      if (kWhole && half) {
        const Bits2 v = Load8(halves + quad);
        s[e] = HalfToFloat(v.x & 0xffffu), s[e + 1] = HalfToFloat(v.x >> 16);
        s[e + 2] = HalfToFloat(v.y & 0xffffu), s[e + 3] = HalfToFloat(v.y >> 16);
      } else if (kWhole) {
        const Float4 v = Load4(floats + quad);
        s[e] = v.x, s[e + 1] = v.y, s[e + 2] = v.z, s[e + 3] = v.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[e + i] = !Has(e + i) ? 0.0f : half ? HalfToFloat(halves[quad + i]) : floats[quad + i];
        }
      }
    }
  }

  RWKV_DEVICE void Store(const StateTensor& state, int32_t slot, int head) const {
    const int64_t at = Place(state, slot, head);
    float* const floats = state.data;
    auto* const halves = reinterpret_cast<uint16_t*>(state.data);
#pragma unroll
    for (int e = 0; e < kPart; e += 4) {
      const int64_t quad = at + row * n + Key(e);
      if (kWhole && half) {
        Store8(halves + quad,
               {FloatToHalf(s[e]) | FloatToHalf(s[e + 1]) << 16, FloatToHalf(s[e + 2]) | FloatToHalf(s[e + 3]) << 16});
      } else if (kWhole) {
        Store4(floats + quad, {s[e], s[e + 1], s[e + 2], s[e + 3]});
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!Has(e + i)) continue;
          if (half) {
            halves[quad + i] = static_cast<uint16_t>(FloatToHalf(s[e + i]));
          } else {
            floats[quad + i] = s[e + i];
          }
        }
      }
    }
  }

  // As it is stored, behind every token: what follows does not depend on whether it was.
  RWKV_DEVICE void Round() {
    if (!half) return;
#pragma unroll
    for (int e = 0; e < kPart; ++e) s[e] = HalfToFloat(FloatToHalf(s[e]));
  }

  RWKV_DEVICE int64_t Place(const StateTensor& state, int32_t slot, int head) const {
    return slot * state.stride + int64_t{head} * n * n;
  }

  const int n;
  const bool half;  // Stored in fp16.
  const int row;
  const int part;
  float s[kPart];
};

// Floats [head size] in shared memory, and zeros up to a multiple of 16 where a thread's part of a row may reach.
template <int kQuads>
struct alignas(16) HeadVector {
  float values[16 * kQuads];

  RWKV_DEVICE float operator[](int channel) const { return values[channel]; }
  RWKV_DEVICE void Set(int channel, float value) { values[channel] = value; }
  RWKV_DEVICE Float4 Quad(int channel) const { return Load4(values + channel); }
};

template <int kQuads>
struct HeadSums {
  float values[kHeadThreads<kQuads> / kWarpThreads];
};

// One group of group norm a head: the value that the threads with part 0 of a row have, normalised.
template <int kQuads>
RWKV_DEVICE float NormalizeHead(float value, bool counts, int n, float epsilon, HeadSums<kQuads>& sums,
                                HeadSums<kQuads>& squares) {
  const float mean = BlockSum(counts ? value : 0.0f, sums.values) / static_cast<float>(n);
  const float distance = value - mean;
  const float variance = BlockSum(counts ? distance * distance : 0.0f, squares.values) / static_cast<float>(n);
  return distance * (1.0f / Sqrt(variance + epsilon));
}

// Of a state pool of [heads, n, n]: whether every head can be read by sixteens of bytes.
inline bool HeadsAreAligned(const StateTensor& state, int64_t head_size) {
  return IsAligned16(state.data) && state.stride % 4 == 0 && head_size % 4 == 0;
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
