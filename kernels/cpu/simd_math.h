// exp, sigmoid and tanh per lane: every lane is computed alike, so a value does not depend on its place. NaN stays NaN.
// Largest errors against long double, over all of the range (simd_math_test.cc): exp 1.5 ulp, sigmoid 3 ulp, tanh 3
// ulp.
#pragma once

#include "kernels/cpu/simd.h"

namespace rwkv::kernels::cpu {
namespace {

// e^x = 2^n e^r with n = round(x / ln 2). Polynomial: Cephes expf (S. Moshier), |r| <= ln(2)/2. Subnormal results are
// kept.
RWKV_INLINE F32 Exp(F32 x) {
  x = Select(x > Broadcast(89.0f), Broadcast(89.0f), x);      // Infinite from 88.73 on,
  x = Select(x < Broadcast(-104.0f), Broadcast(-104.0f), x);  // zero below -103.98.
  const F32 magic = Broadcast(0x1.8p23f);                     // Adding it leaves the rounded integer in the low bits.
  const F32 shifted = Fma(x, Broadcast(1.44269504088896341f), magic);
  const F32 n = shifted - magic;
  F32 r = Fma(n, Broadcast(-0.693359375f), x);  // ln 2 in two parts; the first has few bits, so n times it is exact.
  r = Fma(n, Broadcast(2.12194440e-4f), r);
  F32 p = Broadcast(1.9875691500e-4f);
  p = Fma(p, r, Broadcast(1.3981999507e-3f));
  p = Fma(p, r, Broadcast(8.3334519073e-3f));
  p = Fma(p, r, Broadcast(4.1665795894e-2f));
  p = Fma(p, r, Broadcast(1.6666665459e-1f));
  p = Fma(p, r, Broadcast(5.0000001201e-1f));
  const F32 y = Fma(p, r * r, r) + 1.0f;
  // 2^n as two factors, each in range: n goes from -150 to 128.
  const U32 exponent = (U32)shifted - (U32)magic;
  const U32 first = (U32)((I32)exponent >> 1);
  const U32 second = exponent - first;
  return y * (F32)((first + 127u) << 23) * (F32)((second + 127u) << 23);
}

// From e^-|x|, which cannot overflow.
RWKV_INLINE F32 Sigmoid(F32 x) {
  const F32 e = Exp(-Abs(x));
  return Select(x < F32{}, e, Broadcast(1.0f)) / (e + 1.0f);
}

// Of |x|, with the sign of x: near zero the odd polynomial of Cephes tanhf, elsewhere (1 - e^-2|x|) / (1 + e^-2|x|).
RWKV_INLINE F32 Tanh(F32 x) {
  const F32 magnitude = Abs(x);
  const F32 e = Exp(magnitude * -2.0f);
  const F32 large = (1.0f - e) / (e + 1.0f);
  const F32 z = x * x;
  F32 p = Broadcast(-5.70498872745e-3f);
  p = Fma(p, z, Broadcast(2.06390887954e-2f));
  p = Fma(p, z, Broadcast(-5.37397155531e-2f));
  p = Fma(p, z, Broadcast(1.33314422036e-1f));
  p = Fma(p, z, Broadcast(-3.33332819422e-1f));
  const F32 small = Fma(p * z, magnitude, magnitude);
  return (F32)((U32)Select(magnitude < Broadcast(0.625f), small, large) | ((U32)x & 0x80000000u));
}

}  // namespace
}  // namespace rwkv::kernels::cpu
