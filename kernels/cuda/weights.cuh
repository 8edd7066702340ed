// A matrix as the device keeps it, and eight of its weights as floats.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/device_weight.h"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kChunk = 8;  // weights

constexpr int kLineBytes = 128;
constexpr int kPrefetchedLines = 8;  // of a row

// Before BeginKernel(): the beginnings of rows [first, first + count), as far as there are any, on their way into the
// second-level cache, while the kernel before ends.
RWKV_DEVICE void PrefetchRows(const DeviceWeight& weight, int first, int count) {
  for (int i = ThreadIndex(); i < count * kPrefetchedLines; i += BlockThreads()) {
    const int row = first + i / kPrefetchedLines;
    const int64_t at = i % kPrefetchedLines * kLineBytes;
    if (row < weight.rows && at < weight.pitch) {
      Prefetch(static_cast<const char*>(weight.data) + row * weight.pitch + at);
    }
  }
}

struct WeightChunk {
  float w[kChunk];
};

// The whole number of eight of `bits`.
RWKV_DEVICE float Code8(uint32_t bits, int index) {
  return static_cast<float>(static_cast<int8_t>(Field<8>(bits, index)));
}
RWKV_DEVICE float Code4(uint32_t bits, int index) { return static_cast<float>(Field<4>(bits, index)); }

// Weights [k, k + 8) of a row; k is a multiple of eight below the number of columns. What lies behind the last column
// is any finite number.
template <WeightKind kKind>
RWKV_DEVICE WeightChunk LoadChunk(const DeviceWeight& weight, int64_t row, int64_t k) {
  WeightChunk chunk;
  const char* const data = static_cast<const char*>(weight.data) + row * weight.pitch;
  if constexpr (kKind == WeightKind::kFloat32) {
    const Bits4 low = LoadStreaming16(data + 4 * k);
    const Bits4 high = LoadStreaming16(data + 4 * k + 16);
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) chunk.w[e] = AsFloat(bits[e]);
  } else if constexpr (kKind == WeightKind::kBFloat16 || kKind == WeightKind::kFloat16) {
    const Bits4 v = LoadStreaming16(data + 2 * k);
    const uint32_t bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (kKind == WeightKind::kBFloat16) {
        chunk.w[2 * e] = AsFloat(bits[e] << 16);
        chunk.w[2 * e + 1] = AsFloat(bits[e] & 0xffff0000u);
      } else {
        chunk.w[2 * e] = HalfToFloat(bits[e] & 0xffffu);
        chunk.w[2 * e + 1] = HalfToFloat(bits[e] >> 16);
      }
    }
  } else {
    const int64_t at = row * weight.groups + k / weight.group;
    const float scale = HalfToFloat(weight.scales[at]);
    const float minimum = weight.minimums == nullptr ? 0.0f : HalfToFloat(weight.minimums[at]);
    if constexpr (kKind == WeightKind::kInt8) {
      const uint32_t low = *reinterpret_cast<const uint32_t*>(data + k);
      const uint32_t high = *reinterpret_cast<const uint32_t*>(data + k + 4);
#pragma unroll
      for (int e = 0; e < 8; ++e) chunk.w[e] = Fma(Code8(e < 4 ? low : high, e % 4), scale, minimum);
    } else {
      const uint32_t codes = *reinterpret_cast<const uint32_t*>(data + k / 2);
#pragma unroll
      for (int e = 0; e < 8; ++e) chunk.w[e] = Fma(Code4(codes, e), scale, minimum);
    }
  }
  return chunk;
}

RWKV_DEVICE WeightChunk LoadChunk(const DeviceWeight& weight, int64_t row, int64_t k) {
  switch (weight.kind) {
    case WeightKind::kFloat32:
      return LoadChunk<WeightKind::kFloat32>(weight, row, k);
    case WeightKind::kBFloat16:
      return LoadChunk<WeightKind::kBFloat16>(weight, row, k);
    case WeightKind::kFloat16:
      return LoadChunk<WeightKind::kFloat16>(weight, row, k);
    case WeightKind::kInt8:
      return LoadChunk<WeightKind::kInt8>(weight, row, k);
    case WeightKind::kInt4:
      break;
  }
  return LoadChunk<WeightKind::kInt4>(weight, row, k);
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
