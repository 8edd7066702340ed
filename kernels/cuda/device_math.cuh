// exp, sigmoid and tanh from operations that round alike on a GPU and in the emulation: the bits are the same there.
// The polynomials and the bounds of their errors are those of kernels/cpu/simd_math.h: 1.5, 3 and 3 ulp. NaN stays NaN.
#pragma once

#include "kernels/api/products.h"
#include "kernels/cuda/device.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

RWKV_DEVICE float Abs(float x) { return AsFloat(AsBits(x) & 0x7fffffffu); }

// e^x = 2^n e^r with n = round(x / ln 2). Polynomial: Cephes expf (S. Moshier), |r| <= ln(2)/2.
RWKV_DEVICE float Exp(float x) {
  x = x > 89.0f ? 89.0f : x;        // Infinite from 88.73 on,
  x = x < -104.0f ? -104.0f : x;    // zero below -103.98.
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits.
  const float shifted = Fma(x, 1.44269504088896341f, magic);
  const float n = shifted - magic;
  float r = Fma(n, -0.693359375f, x);  // ln 2 in two parts; the first has few bits, so n times it is exact.
  r = Fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = Fma(p, r, 1.3981999507e-3f);
  p = Fma(p, r, 8.3334519073e-3f);
  p = Fma(p, r, 4.1665795894e-2f);
  p = Fma(p, r, 1.6666665459e-1f);
  p = Fma(p, r, 5.0000001201e-1f);
  const float y = Fma(p, r * r, r) + 1.0f;
  // 2^n as two factors, each in range: n goes from -150 to 128.
  const uint32_t exponent = AsBits(shifted) - AsBits(magic);
  const uint32_t first = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  const uint32_t second = exponent - first;
  return y * AsFloat((first + 127u) << 23) * AsFloat((second + 127u) << 23);
}

// From e^-|x|, which cannot overflow.
RWKV_DEVICE float Sigmoid(float x) {
  const float e = Exp(-Abs(x));
  return (x < 0.0f ? e : 1.0f) / (e + 1.0f);
}

// Of |x|, with the sign of x: near zero the odd polynomial of Cephes tanhf, elsewhere (1 - e^-2|x|) / (1 + e^-2|x|).
RWKV_DEVICE float Tanh(float x) {
  const float magnitude = Abs(x);
  const float e = Exp(magnitude * -2.0f);
  const float large = (1.0f - e) / (e + 1.0f);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = Fma(p, z, 2.06390887954e-2f);
  p = Fma(p, z, -5.37397155531e-2f);
  p = Fma(p, z, 1.33314422036e-1f);
  p = Fma(p, z, -3.33332819422e-1f);
  const float small = Fma(p * z, magnitude, magnitude);
  return AsFloat(AsBits(magnitude < 0.625f ? small : large) | (AsBits(x) & 0x80000000u));
}

RWKV_DEVICE float Activate(Activation activation, float z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return Tanh(z);
    case Activation::kSquaredRelu:
      return z <= 0.0f ? 0.0f : z * z;  // NaN is not below zero.
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kDecay:
      return Exp(-Exp(z));
  }
  return z;
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
