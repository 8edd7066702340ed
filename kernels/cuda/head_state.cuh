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

  RWKV_DEVICE explicit HeadState(int head_size)
      : n(kWhole ? 16 * kQuads : head_size),
        row(ThreadIndex() / kThreadsOfStateRow),
        part(ThreadIndex() % kThreadsOfStateRow) {}

  // The key channel of an element.
  RWKV_DEVICE int Key(int e) const { return 4 * (part + kThreadsOfStateRow * (e / 4)) + e % 4; }
  RWKV_DEVICE bool Has(int e) const { return kWhole || (row < n && Key(e) < n); }

  RWKV_DEVICE void Load(const float* head) {
#pragma unroll
    for (int e = 0; e < kPart; e += 4) {
      if constexpr (kWhole) {
        const Float4 v = Load4(head + row * n + Key(e));
        s[e] = v.x, s[e + 1] = v.y, s[e + 2] = v.z, s[e + 3] = v.w;
      } else {
#pragma unroll
        for (int i = e; i < e + 4; ++i) s[i] = Has(i) ? head[row * n + Key(i)] : 0.0f;
      }
    }
  }

  RWKV_DEVICE void Store(float* head) const {
#pragma unroll
    for (int e = 0; e < kPart; e += 4) {
      if constexpr (kWhole) {
        Store4(head + row * n + Key(e), {s[e], s[e + 1], s[e + 2], s[e + 3]});
      } else {
#pragma unroll
        for (int i = e; i < e + 4; ++i) {
          if (Has(i)) head[row * n + Key(i)] = s[i];
        }
      }
    }
  }

  const int n;
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
