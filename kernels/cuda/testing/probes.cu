#include "kernels/base/deterministic_math.h"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/testing/probes.h"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {
namespace {

struct ProbeShared {
  float values[kProbeThreads];
  float sums[kProbeThreads / kWarpThreads];
  uint64_t counts[4];
};

// The bfloat16 bits of the float's upper half, twice in a word.
RWKV_DEVICE uint32_t Pair(float low, float high) { return AsBits(low) >> 16 | (AsBits(high) & 0xffff0000u); }

RWKV_DEVICE uint32_t HalfPair(float low, float high) { return FloatToHalf(low) | FloatToHalf(high) << 16; }

template <bool kWhole>
RWKV_DEVICE void ProbeMatrix(const float* in, int t, float* out) {
  const auto at = [&](int i) {
    const float x = in[(t + 32 * i) % kProbeThreads];
    return kWhole ? static_cast<float>(static_cast<int>(AsBits(x) & 15u) - 7) : x;
  };
  float c[4] = {at(0), at(1), at(2), at(3)};
  const uint32_t a[2][4] = {{Pair(at(4), at(5)), Pair(at(6), at(7)), Pair(at(1), at(4)), Pair(at(2), at(0))},
                            {Pair(at(3), at(1)), Pair(at(0), at(6)), Pair(at(5), at(2)), Pair(at(7), at(3))}};
  const uint32_t b[2][2] = {{Pair(at(2), at(6)), Pair(at(7), at(1))}, {Pair(at(0), at(4)), Pair(at(3), at(5))}};
  MmaBf16(c, a, b);
  for (int i = 0; i < 4; ++i) out[i] = c[i];
}

RWKV_KERNEL(kProbeThreads) ProbeKernel(Probe probe, const float* all, float* outs) {
  auto& shared = BlockShared<ProbeShared>();
  const int t = ThreadIndex();
  const float* const in = all + int64_t{BlockIndexX()} * kProbeThreads;
  float* const out = outs + (int64_t{BlockIndexX()} * kProbeThreads + t) * kProbeOutputs;
  const float x = in[t];
  const float y = in[t ^ 1];
  const float z = in[kProbeThreads - 1 - t];
  float values[kProbeOutputs] = {};
  switch (probe) {
    case Probe::kArithmetic:
      values[0] = Fma(x, y, z);
      values[1] = x * y + z;
      values[2] = x / y;
      values[3] = Sqrt(Abs(x));
      values[4] = x + y;
      values[5] = x - y;
      values[6] = x * y;
      values[7] = Abs(x) < 1e6f ? static_cast<float>(static_cast<int>(x)) : 0.0f;
      break;
    case Probe::kHalf:
      values[0] = HalfToFloat(AsBits(x) & 0xffffu);
      values[1] = HalfToFloat(AsBits(x) >> 16);
      values[2] = static_cast<float>(FloatToHalf(x));
      values[3] = static_cast<float>(FloatToBFloat16(x));
      break;
    case Probe::kMath:
      values[0] = Exp(x);
      values[1] = Sigmoid(x);
      values[2] = Tanh(x);
      values[3] = Abs(x);
      break;
    case Probe::kDoubles: {
      const double wide = static_cast<double>(x) * static_cast<double>(y);
      const double size = wide < 0.0 ? -wide : wide;
      const uint64_t parts[2] = {AsBits(deterministic::Exp(-size)), AsBits(deterministic::Log(size + 0x1p-60))};
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(parts[i / 4] >> (16 * (i % 4)) & 0xffffu);
      values[7] += AsDouble(parts[0]) < 0.5 ? 0.5f : 0.0f;
      break;
    }
    case Probe::kShuffle:
      values[0] = ShuffleXor(x, 1);
      values[1] = ShuffleXor(x, 2);
      values[2] = ShuffleXor(x, 4);
      values[3] = ShuffleXor(x, 8);
      values[4] = ShuffleXor(x, 16);
      values[5] = ShuffleXor(x, 31);
      break;
    case Probe::kSums:
      values[0] = WarpSum(x);
      values[1] = WarpSum<16>(x);
      values[2] = WarpSum<8>(x);
      values[3] = WarpSum<4>(x);
      values[4] = WarpSum<2>(x);
      values[5] = BlockSum(x, shared.sums);
      break;
    case Probe::kWide: {
      const Float4 v = Load4(in + t / 4 * 4);
      const Bits4 bits = LoadStreaming16(in + (kProbeThreads / 4 - 1 - t / 4) * 4);
      Store4(out, {v.w, v.z, v.y, v.x});
      Store4(out + 4, {AsFloat(bits.y), AsFloat(bits.x), AsFloat(bits.w), AsFloat(bits.z)});
      return;
    }
    case Probe::kShared:
      shared.values[t] = x;
      SyncBlock();
      values[0] = shared.values[kProbeThreads - 1 - t];
      values[1] = shared.values[(t + 77) % kProbeThreads];
      SyncBlock();
      shared.values[t ^ 5] = y;
      SyncWarp();
      values[2] = shared.values[t ^ 9];
      if (t < 4) shared.counts[t] = static_cast<uint64_t>(t) << 32;
      SyncBlock();
      AtomicAdd(&shared.counts[t % 4], AsBits(x));
      SyncBlock();
      values[3] = static_cast<float>(shared.counts[t / 4 % 4] & 0xffffffu);
      values[4] = static_cast<float>(shared.counts[t / 4 % 4] >> 24 & 0xffffffu);
      break;
    case Probe::kMatrix:
      ProbeMatrix<true>(in, t, values);
      break;
    case Probe::kMatrixOfBytes: {
      const Bits2 v = LoadStreaming8(in + t / 2 * 2);
      const uint32_t a[4] = {AsBits(x), AsBits(y), AsBits(z), v.x};
      const uint32_t b[2] = {AsBits(in[t / 8]), v.y};
      int32_t c[4] = {t, -t, 1 << t % 20, 0};
      MmaInt8(c, a, b);
      for (int i = 0; i < 4; ++i) values[i] = static_cast<float>(c[i]);
      break;
    }
    case Probe::kMatrixOfReals:
      ProbeMatrix<false>(in, t, values);
      break;
    case Probe::kMatrixOfHalves: {
      const auto at = [&](int i) {
        return static_cast<float>(static_cast<int>(AsBits(in[(t + 32 * i) % kProbeThreads]) & 31u) - 15);
      };
      float c[4] = {at(0), at(1), at(2), at(3)};
      const uint32_t a[1][4] = {
          {HalfPair(at(4), at(5)), HalfPair(at(6), at(7)), HalfPair(at(1), at(4)), HalfPair(at(2), at(0))}};
      const uint32_t b[1][2] = {{HalfPair(at(2), at(6)), HalfPair(at(7), at(1))}};
      MmaHalf(c, a, b);
      for (int i = 0; i < 4; ++i) values[i] = c[i];
      break;
    }
  }
  for (int i = 0; i < kProbeOutputs; ++i) out[i] = values[i];
}

int LaunchProbe(Probe probe, const float* in, float* out, int blocks, StreamHandle stream) {
  const LaunchShape shape = {static_cast<uint32_t>(blocks), 1, kProbeThreads, sizeof(ProbeShared)};
  return Launch(stream, shape, "probe", ProbeKernel, probe, in, out);
}

RWKV_KERNEL(kProbeThreads) MatrixRateKernel(float* out, int rounds) {
  constexpr uint32_t kOnes = 0x3f803f80u;
  const uint32_t a[1][4] = {{kOnes, kOnes, kOnes, kOnes}};
  const uint32_t b[1][2] = {{kOnes, kOnes}};
  float c[8][4] = {};  // Eight at a time: each waits for its own last one.
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < 8; ++i) MmaBf16(c[i], a, b);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += c[i][0];
  if (ThreadIndex() == 0) out[BlockIndexX()] = sum;
}

int LaunchMatrixRate(float* out, int blocks, int rounds, StreamHandle stream) {
  return Launch(stream, {static_cast<uint32_t>(blocks), 1, kProbeThreads, 0}, "matrix_rate", MatrixRateKernel, out,
                rounds);
}

}  // namespace
}  // namespace RWKV_CUDA_BUILD

const ProbeSet RWKV_CUDA_PROBE_SET = {LaunchProbe, LaunchMatrixRate};

}  // namespace rwkv::kernels::cuda
