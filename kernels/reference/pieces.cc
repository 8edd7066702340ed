#include "kernels/reference/pieces.h"

#include <algorithm>
#include <cmath>

namespace rwkv::kernels::reference {

float Sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }

void Normalize(const float* x, const float* weight, const float* bias, int64_t n, float epsilon, float* y) {
  float sum = 0.0f;
  for (int64_t c = 0; c < n; ++c) sum += x[c];
  const float mean = sum / static_cast<float>(n);
  float squares = 0.0f;
  for (int64_t c = 0; c < n; ++c) squares += (x[c] - mean) * (x[c] - mean);
  const float deviation = std::sqrt(squares / static_cast<float>(n) + epsilon);
  for (int64_t c = 0; c < n; ++c) y[c] = (x[c] - mean) / deviation * weight[c] + bias[c];
}

void Shift(const float* now, const float* before, const float* mix, int64_t n, float* y) {
  for (int64_t c = 0; c < n; ++c) y[c] = now[c] + (before[c] - now[c]) * mix[c];
}

float Recur4(float decay, float bonus, float k, float v, float* aa, float* bb, float* pp) {
  float q = std::max(*pp, bonus + k);
  float old_scale = std::exp(*pp - q);
  float new_scale = std::exp(bonus + k - q);
  const float wkv = (old_scale * *aa + new_scale * v) / (old_scale * *bb + new_scale);
  q = std::max(*pp + decay, k);
  old_scale = std::exp(*pp + decay - q);
  new_scale = std::exp(k - q);
  *aa = old_scale * *aa + new_scale * v;
  *bb = old_scale * *bb + new_scale;
  *pp = q;
  return wkv;
}

void Recur6(const float* r, const float* w, const float* k, const float* v, const float* bonus, int64_t n, float* state,
            float* o) {
  float own = 0.0f;
  for (int64_t j = 0; j < n; ++j) own += r[j] * k[j] * bonus[j];
  for (int64_t i = 0; i < n; ++i) {
    float* row = state + i * n;
    float read = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
      read += row[j] * r[j];
      row[j] = row[j] * w[j] + v[i] * k[j];
    }
    o[i] = read + own * v[i];
  }
}

void Recur7(const float* r, const float* w, const float* k, const float* v, const float* a, const float* b, int64_t n,
            float* state, float* o) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = state + i * n;
    float recall = 0.0f;
    for (int64_t j = 0; j < n; ++j) recall += row[j] * a[j];
    float read = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
      row[j] = row[j] * w[j] + v[i] * k[j] + recall * b[j];
      read += row[j] * r[j];
    }
    o[i] = read;
  }
}

void PrepareFor7(const Prepare7& p, int64_t n, float* k, float* v, float* w, float* a, float* b) {
  constexpr float kInverseSqrtE = 0.60653066f;  // e^(-1/2)
  float squares = 0.0f;
  for (int64_t j = 0; j < n; ++j) {
    const float kappa = k[j] * p.k_k[j];
    squares += kappa * kappa;
  }
  const float norm = std::max(std::sqrt(squares), 1e-12f);
  for (int64_t j = 0; j < n; ++j) {
    const float iclr = Sigmoid(p.iclr_bias[j] + p.iclr_lora[j]);
    const float kappa_hat = k[j] * p.k_k[j] / norm;
    if (p.v_first != nullptr) v[j] += (p.v_first[j] - v[j]) * Sigmoid(p.gate_bias[j] + p.gate_lora[j]);
    k[j] = k[j] * (1.0f + (iclr - 1.0f) * p.k_a[j]);
    w[j] = std::exp(-kInverseSqrtE * Sigmoid(p.decay_bias[j] + p.decay_lora[j]));
    a[j] = -kappa_hat;
    b[j] = kappa_hat * iclr;
  }
}

void AddBonusAndGate(const float* r, const float* k, const float* v, const float* bonus, const float* g, int64_t n,
                     float* z) {
  float own = 0.0f;
  for (int64_t j = 0; j < n; ++j) own += r[j] * k[j] * bonus[j];
  for (int64_t j = 0; j < n; ++j) z[j] = (z[j] + own * v[j]) * g[j];
}

}  // namespace rwkv::kernels::reference
