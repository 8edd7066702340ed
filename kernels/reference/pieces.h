// The plain pieces that the operations are composed of, each for one row, and where there are heads for one head of it:
// scalar float, plain loops, libm.
#pragma once

#include <cstdint>

namespace rwkv::kernels::reference {

float Sigmoid(float z);

// y = (x - mean) / sqrt(var + eps) * weight + bias over n channels, var being the biased variance; y may be x.
void Normalize(const float* x, const float* weight, const float* bias, int64_t n, float epsilon, float* y);

// y = now + (before - now) * mix; y may be now.
void Shift(const float* now, const float* before, const float* mix, int64_t n, float* y);

// RWKV-4, of one channel: the weighted mean that the token reads; the state after it.
float Recur4(float decay, float bonus, float k, float v, float* aa, float* bb, float* pp);

// RWKV-5 and 6, of a head with n channels; state [n, n]. o is what is read.
void Recur6(const float* r, const float* w, const float* k, const float* v, const float* bonus, int64_t n, float* state,
            float* o);

// RWKV-7's recurrence of a head with n channels; state [n, n]. o is what is read.
void Recur7(const float* r, const float* w, const float* k, const float* v, const float* a, const float* b, int64_t n,
            float* state, float* o);

// What RWKV-7's recurrence takes of a head, from its products; `gate_bias`, `gate_lora` and `v_first` may be null.
struct Prepare7 {
  const float* decay_bias;
  const float* iclr_bias;
  const float* k_k;
  const float* k_a;
  const float* decay_lora;
  const float* iclr_lora;
  const float* gate_bias;
  const float* gate_lora;
  const float* v_first;
};
// k and v are changed in place; w, a and b are written.
void PrepareFor7(const Prepare7& p, int64_t n, float* k, float* v, float* w, float* a, float* b);

// z = (z + (sum r * k * bonus) * v) * g
void AddBonusAndGate(const float* r, const float* k, const float* v, const float* bonus, const float* g, int64_t n,
                     float* z);

}  // namespace rwkv::kernels::reference
