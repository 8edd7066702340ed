// The one door to the device: everything that a kernel needs beyond C++. Kernels are headers (*.cuh) that include this
// one and are compiled twice: by nvcc into the product, and as plain C++ against the emulation in testing/, which runs
// and checks them on a CPU. This is the only file that knows which of the two is being built. Blocks have one dimension
// and whole warps; collectives take the whole warp.
//
// With nvcc's -fmad=false and clang's -ffp-contract=off, + - * / Sqrt and Fma round once each, so that a kernel without
// tensor cores has the same bits in both.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/cuda/launch_shape.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RWKV_CUDA_BUILD device
#define RWKV_CUDA_KERNEL_SET kDeviceKernels
#define RWKV_CUDA_PROBE_SET kDeviceProbes
#define RWKV_DEVICE __device__ __forceinline__
#define RWKV_KERNEL(threads) __global__ void __launch_bounds__(threads)
// With registers for one block of it on a multiprocessor.
#define RWKV_LARGE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

#else

#include "kernels/cuda/testing/emulation.h"

// The build for the checker (testing/checker.h) names itself on the command line.
#ifndef RWKV_CUDA_BUILD
#define RWKV_CUDA_BUILD emulated
#define RWKV_CUDA_KERNEL_SET kEmulatedKernels
#define RWKV_CUDA_PROBE_SET kEmulatedProbes
#endif
#define RWKV_DEVICE inline
#define RWKV_KERNEL(threads) void
#define RWKV_LARGE_KERNEL(threads) void

#endif

namespace rwkv::kernels::cuda {
// So that a program can hold the builds side by side.
inline namespace RWKV_CUDA_BUILD {

constexpr int kWarpThreads = 32;

struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(16) Bits4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Bits2 {
  uint32_t x, y;
};

#ifdef __CUDACC__

RWKV_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
RWKV_DEVICE int BlockThreads() { return static_cast<int>(blockDim.x); }
RWKV_DEVICE int BlockIndexX() { return static_cast<int>(blockIdx.x); }
RWKV_DEVICE int BlockIndexY() { return static_cast<int>(blockIdx.y); }

// The first thing that every thread of a kernel does but for fetching weights, which nobody writes while kernels run.
// Where launches overlap, a block may begin while the kernel before still runs: here it waits until that one is done
// and what it wrote is seen, and lets the next one begin. Elsewhere this is nothing.
RWKV_DEVICE void BeginKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Brings a line of memory into the second-level cache. It may be called before BeginKernel().
RWKV_DEVICE void Prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

RWKV_DEVICE void SyncBlock() { __syncthreads(); }
RWKV_DEVICE void SyncWarp() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`.
RWKV_DEVICE float ShuffleXor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Adds to a number in the block's shared memory that others add to meanwhile. It orders nothing.
RWKV_DEVICE void AtomicAdd(uint64_t* to, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// The block's shared memory, undefined at its start. One T in a kernel; the launch gives sizeof(T).
template <typename T>
RWKV_DEVICE T& BlockShared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
}

// 16 bytes, aligned to as many.
template <typename T>
RWKV_DEVICE Float4 Load4(const T* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {v.x, v.y, v.z, v.w};
}
RWKV_DEVICE void Store4(float* to, const Float4& v) {
  *reinterpret_cast<float4*>(to) = make_float4(v.x, v.y, v.z, v.w);
}
// 8 bytes, aligned to as many.
RWKV_DEVICE Bits2 Load8(const void* from) {
  const uint2 v = *static_cast<const uint2*>(from);
  return {v.x, v.y};
}
RWKV_DEVICE void Store8(void* to, const Bits2& v) { *static_cast<uint2*>(to) = make_uint2(v.x, v.y); }
// The same of memory that nobody writes while the kernel runs, and which it reads once: past the first cache.
RWKV_DEVICE Bits4 LoadStreaming16(const void* from) {
  const uint4 v = __ldcs(static_cast<const uint4*>(from));
  return {v.x, v.y, v.z, v.w};
}
// 8 bytes, aligned to as many.
RWKV_DEVICE Bits2 LoadStreaming8(const void* from) {
  const uint2 v = __ldcs(static_cast<const uint2*>(from));
  return {v.x, v.y};
}

RWKV_DEVICE float Fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RWKV_DEVICE float Sqrt(float x) { return __fsqrt_rn(x); }
// The bits [index * kBits, index * kBits + kBits) of a word.
template <int kBits>
RWKV_DEVICE uint32_t Field(uint32_t word, int index) {
  return word >> (kBits * index) & ((1u << kBits) - 1);
}
RWKV_DEVICE float AsFloat(uint32_t bits) { return __uint_as_float(bits); }
RWKV_DEVICE uint32_t AsBits(float value) { return __float_as_uint(value); }
RWKV_DEVICE double AsDouble(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
RWKV_DEVICE uint64_t AsBits(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
RWKV_DEVICE float HalfToFloat(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
// To nearest, ties to even.
RWKV_DEVICE uint32_t FloatToHalf(float value) { return __half_as_ushort(__float2half_rn(value)); }
RWKV_DEVICE uint32_t FloatToBFloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// On tensor cores, kSteps times one after the other: c += a b, of 16 x 16 and 16 x 8 bfloat16 values and fp32 sums, whose
// order within a step is the hardware's. A lane's part, with g = lane / 4 and t = lane % 4, two values to 32 bits, the
// first in the low half:
//   a: rows g and g + 8 at inputs 2t, 2t + 1, then the same rows at inputs 2t + 8, 2t + 9
//   b: inputs 2t, 2t + 1, then 2t + 8, 2t + 9, of column g
//   c: columns 2t and 2t + 1 of row g, then those of row g + 8
// (PTX ISA, mma.m16n8k16.)
template <int kSteps>
RWKV_DEVICE void MmaBf16(float (&c)[4], const uint32_t (&a)[kSteps][4], const uint32_t (&b)[kSteps][2]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]), "r"(b[s][0]), "r"(b[s][1]));
  }
}

// The same of fp16 values.
template <int kSteps>
RWKV_DEVICE void MmaHalf(float (&c)[4], const uint32_t (&a)[kSteps][4], const uint32_t (&b)[kSteps][2]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]), "r"(b[s][0]), "r"(b[s][1]));
  }
}

// The same of signed bytes, exactly: c += a b, of 16 x 32 and 32 x 8 bytes and sums of 32 bits. Four values to 32 bits:
//   a: rows g and g + 8 at inputs 4t .. 4t + 3, then the same rows at inputs 4t + 16 .. 4t + 19
//   b: inputs 4t .. 4t + 3, then 4t + 16 .. 4t + 19, of column g
//   c: as above
// (PTX ISA, mma.m16n8k32.)
RWKV_DEVICE void MmaInt8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Enqueues a kernel; arguments are copied. The runtime's error code, 0 if there is none. Never the default stream.
template <typename... Parameters, typename... Arguments>
int Launch(LaunchStream stream, const LaunchShape& shape, const char*, void (*kernel)(Parameters...),
           Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid_x, shape.grid_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream.handle;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = stream.overlaps ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

#else

inline int ThreadIndex() { return emulation::ThreadIndex(); }
inline int BlockThreads() { return emulation::BlockThreads(); }
inline int BlockIndexX() { return emulation::BlockIndexX(); }
inline int BlockIndexY() { return emulation::BlockIndexY(); }

inline void BeginKernel() { emulation::BeginKernel(); }
inline void Prefetch(const void* line) { emulation::CheckPrefetch(line); }

inline void SyncBlock(emulation::Site site = emulation::Site::Here()) { emulation::SyncBlock(site); }
inline void SyncWarp(emulation::Site site = emulation::Site::Here()) { emulation::SyncWarp(site); }

inline float ShuffleXor(float value, int mask, emulation::Site site = emulation::Site::Here()) {
  return emulation::ShuffleXor(value, mask, site);
}

inline void AtomicAdd(uint64_t* to, uint64_t value) { emulation::AtomicAdd(to, value, __builtin_return_address(0)); }

template <typename T>
T& BlockShared() {
  return *static_cast<T*>(emulation::BlockShared(sizeof(T)));
}

template <typename T>
Float4 Load4(const T* from) {
  Float4 v;
  emulation::Read16(from, &v, __builtin_return_address(0));
  return v;
}
inline void Store4(float* to, const Float4& v) { emulation::Write16(to, &v, __builtin_return_address(0)); }
inline Bits2 Load8(const void* from) {
  Bits2 v;
  emulation::Read8(from, &v, __builtin_return_address(0));
  return v;
}
inline void Store8(void* to, const Bits2& v) { emulation::Write8(to, &v, __builtin_return_address(0)); }
inline Bits4 LoadStreaming16(const void* from) {
  Bits4 v;
  emulation::Read16(from, &v, __builtin_return_address(0));
  return v;
}
inline Bits2 LoadStreaming8(const void* from) {
  Bits2 v;
  emulation::Read8(from, &v, __builtin_return_address(0));
  return v;
}

inline float Fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float Sqrt(float x) { return __builtin_sqrtf(x); }
template <int kBits>
uint32_t Field(uint32_t word, int index) {
  emulation::CheckShift(kBits * index);
  return word >> (kBits * index) & ((1u << kBits) - 1);
}
inline float AsFloat(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t AsBits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline double AsDouble(uint64_t bits) {
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint64_t AsBits(double value) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float HalfToFloat(uint32_t bits) {
  const float scaled = AsFloat((bits & 0x7fffu) << 13) * 0x1p112f;  // Exact; infinity and NaN come out finite.
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return AsFloat(AsBits(scaled) | special | (bits & 0x8000u) << 16);
}

inline uint32_t FloatToHalf(float value) {
  const uint32_t bits = AsBits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;  // NVIDIA's one NaN, without the sign of the float's.
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520, half a step above the largest, and more.
  if (magnitude < 0x38800000u) {                        // Below 2^-14 a step is 2^-24: adding 0.5 rounds to it.
    return sign | (AsBits(AsFloat(magnitude) + 0.5f) - AsBits(0.5f));
  }
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}

inline uint32_t FloatToBFloat16(float value) {
  const uint32_t bits = AsBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

template <int kSteps>
void MmaBf16(float (&c)[4], const uint32_t (&a)[kSteps][4], const uint32_t (&b)[kSteps][2],
             emulation::Site site = emulation::Site::Here()) {
  emulation::MmaBf16(c, a[0], b[0], kSteps, site);
}
template <int kSteps>
void MmaHalf(float (&c)[4], const uint32_t (&a)[kSteps][4], const uint32_t (&b)[kSteps][2],
             emulation::Site site = emulation::Site::Here()) {
  emulation::MmaHalf(c, a[0], b[0], kSteps, site);
}
inline void MmaInt8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    emulation::Site site = emulation::Site::Here()) {
  emulation::MmaInt8(c, a, b, site);
}

template <typename... Parameters, typename... Arguments>
int Launch(LaunchStream stream, const LaunchShape& shape, const char* name, void (*kernel)(Parameters...),
           Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<std::decay_t<Parameters> > && ...), "a device gets copies of bytes");
  static_assert((sizeof(std::decay_t<Parameters>) + ... + 0) <= 4096, "parameters have 4 KB");
  return emulation::Submit(stream, shape, name, emulation::Bind(kernel, std::forward<Arguments>(arguments)...));
}

#endif

// The sum over groups of kWidth neighbouring lanes, in all of them: pairs, pairs of pairs, and so on, so that every
// lane has the same bits.
template <int kWidth = kWarpThreads>
#ifdef __CUDACC__
RWKV_DEVICE float WarpSum(float value) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  return value;
}
#else
float WarpSum(float value, emulation::Site site = emulation::Site::Here()) {
  return emulation::WarpSum(value, kWidth, site);
}
#endif

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
