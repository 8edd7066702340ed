// Numbers of 16 bits as NVIDIA's own headers convert them on a CPU, which is what they say a GPU does: bit for bit, the
// NaNs among them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <random>

#include "gtest/gtest.h"
#include "kernels/cuda/device.cuh"

namespace rwkv::kernels::cuda {
namespace {

void ExpectAsNvidias(uint32_t bits) {
  const float value = AsFloat(bits);
  ASSERT_EQ(FloatToHalf(value), __half_as_ushort(__float2half_rn(value))) << std::hex << bits;
  ASSERT_EQ(FloatToBFloat16(value), __bfloat16_as_ushort(__float2bfloat16_rn(value))) << std::hex << bits;
}

TEST(ConversionsTest, FloatsToSixteenBits) {
  // Every exponent and sign, where roundings change: the mantissa's ends, and each of its bits with its neighbours.
  for (uint32_t upper = 0; upper < 512; ++upper) {
    for (int bit = 0; bit < 23; ++bit) {
      for (const uint32_t mantissa : {0u, 1u << bit, (1u << bit) + 1, (1u << bit) - 1, 3u << bit, (3u << bit) - 1}) {
        ExpectAsNvidias(upper << 23 | (mantissa & 0x7fffffu));
      }
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1'000'000; ++i) ExpectAsNvidias(static_cast<uint32_t>(random()));
}

TEST(ConversionsTest, EveryHalfToFloat) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float nvidias = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    if (nvidias != nvidias) {
      EXPECT_NE(HalfToFloat(bits), HalfToFloat(bits)) << bits;
    } else {
      ASSERT_EQ(AsBits(HalfToFloat(bits)), AsBits(nvidias)) << bits;
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::cuda
