#include "kernels/cuda/testing/emulated_mma.h"

#include <cstring>

#include "kernels/base/dtype.h"

namespace rwkv::kernels::cuda::emulation {
namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;

template <typename Sum>
using Sums = Sum[kColumns][kRows];

template <typename Sum>
void Take(const MmaLanes& warp, Sums<Sum>& c) {
  for (int lane = 0; lane < kMmaLanes; ++lane) {
    const auto* const part = static_cast<const Sum*>(warp.lanes[lane].c);
    for (int i = 0; i < 4; ++i) c[lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = part[i];
  }
}

template <typename Sum>
void Give(const Sums<Sum>& c, const MmaLanes& warp) {
  for (int lane = 0; lane < kMmaLanes; ++lane) {
    auto* const part = static_cast<Sum*>(warp.lanes[lane].c);
    for (int i = 0; i < 4; ++i) part[i] = c[lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8];
  }
}

// Two bfloat16 values, the first in the low half.
void WidenBf16(uint32_t bits, float& low, float& high) {
  const uint32_t parts[2] = {bits << 16, bits & 0xffff0000u};
  std::memcpy(&low, &parts[0], sizeof(low));
  std::memcpy(&high, &parts[1], sizeof(high));
}

// Two of fp16.
void WidenHalf(uint32_t bits, float& low, float& high) {
  const uint16_t parts[2] = {static_cast<uint16_t>(bits), static_cast<uint16_t>(bits >> 16)};
  low = HalfToFloat(parts[0]);
  high = HalfToFloat(parts[1]);
}

// Products of two such values are exact floats.
template <void kWiden(uint32_t, float&, float&)>
void Multiply(const MmaLanes& warp, int steps) {
  constexpr int kInputs = 16;
  Sums<float> c;
  Take(warp, c);
  for (int step = 0; step < steps; ++step) {
    float a[kInputs][kRows];
    float b[kColumns][kInputs];
    for (int lane = 0; lane < kMmaLanes; ++lane) {
      const int g = lane / 4;
      const int k = lane % 4 * 2;
      for (int part = 0; part < 4; ++part) {
        const int row = g + part % 2 * 8;
        const int input = k + part / 2 * 8;
        kWiden(warp.lanes[lane].a[4 * step + part], a[input][row], a[input + 1][row]);
      }
      for (int part = 0; part < 2; ++part) {
        kWiden(warp.lanes[lane].b[2 * step + part], b[g][k + part * 8], b[g][k + part * 8 + 1]);
      }
    }
    for (int column = 0; column < kColumns; ++column) {
      for (int input = 0; input < kInputs; ++input) {
        const float x = b[column][input];
        if (x == 0.0f) continue;  // Columns of few rows are mostly zeros; of what is not finite a GPU makes NaN here.
        for (int row = 0; row < kRows; ++row) c[column][row] += a[input][row] * x;
      }
    }
  }
  Give(c, warp);
}

}  // namespace

void MultiplyBf16(const MmaLanes& warp, int steps) { Multiply<WidenBf16>(warp, steps); }
void MultiplyHalf(const MmaLanes& warp, int steps) { Multiply<WidenHalf>(warp, steps); }

void MultiplyInt8(const MmaLanes& warp) {
  constexpr int kInputs = 32;
  Sums<int32_t> c;
  Take(warp, c);
  int8_t a[kInputs][kRows];
  int8_t b[kColumns][kInputs];
  for (int lane = 0; lane < kMmaLanes; ++lane) {
    const int g = lane / 4;
    const int k = lane % 4 * 4;
    for (int byte = 0; byte < 4; ++byte) {
      for (int part = 0; part < 4; ++part) {
        a[k + part / 2 * 16 + byte][g + part % 2 * 8] = static_cast<int8_t>(warp.lanes[lane].a[part] >> (8 * byte));
      }
      for (int part = 0; part < 2; ++part) {
        b[g][k + part * 16 + byte] = static_cast<int8_t>(warp.lanes[lane].b[part] >> (8 * byte));
      }
    }
  }
  for (int column = 0; column < kColumns; ++column) {
    for (int input = 0; input < kInputs; ++input) {
      const int32_t x = b[column][input];
      for (int row = 0; row < kRows; ++row) c[column][row] += a[input][row] * x;
    }
  }
  Give(c, warp);
}

}  // namespace rwkv::kernels::cuda::emulation
