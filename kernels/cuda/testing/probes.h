// Kernels that show what the wrappers of device.cuh and the functions of device_math.cuh do on a device, for comparison
// with the emulation: bit for bit, but for the sums of tensor cores. And one that keeps tensor cores busy.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch_shape.h"

namespace rwkv::kernels::cuda {

enum class Probe : uint8_t {
  kArithmetic,     // + - * / with and without fusing, Sqrt, to int and back
  kHalf,           // every half of the inputs' bits, FloatToHalf, FloatToBFloat16
  kMath,           // Exp, Sigmoid, Tanh, Abs
  kDoubles,        // exp and log of deterministic_math.h, in parts of 16 bits; AsBits, AsDouble
  kShuffle,        // ShuffleXor by every power of two, and by 31
  kSums,           // WarpSum of every width, BlockSum
  kWide,           // Load4, Store4, LoadStreaming16
  kShared,         // BlockShared, SyncBlock, SyncWarp, AtomicAdd
  kMatrix,         // MmaBf16 of small whole numbers, whose sums are exact: which lane has what
  kMatrixOfBytes,  // MmaInt8, LoadStreaming8
  kMatrixOfReals,  // MmaBf16 of any numbers, whose order of sums is the hardware's own
  kMatrixOfHalves  // MmaHalf of small whole numbers
};
constexpr int kProbes = 12;

constexpr int kProbeThreads = 256;  // of a block
constexpr int kProbeOutputs = 8;    // of a thread

struct ProbeSet {
  // in: [blocks, kProbeThreads], out: [blocks, kProbeThreads, kProbeOutputs], both in device memory, aligned to 16.
  int (*probe)(Probe probe, const float* in, float* out, int blocks, StreamHandle stream);
  // 4096 * 8 * `rounds` floating-point operations a warp, and kProbeThreads / 32 warps a block. out: [blocks], of which
  // each becomes 128 * rounds, exact up to 2^24.
  int (*matrix_rate)(float* out, int blocks, int rounds, StreamHandle stream);
};

extern const ProbeSet kDeviceProbes;
extern const ProbeSet kEmulatedProbes;

}  // namespace rwkv::kernels::cuda
