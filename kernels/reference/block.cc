#include "kernels/reference/block.h"

#include <algorithm>
#include <cmath>

namespace rwkv::kernels::reference {
namespace {

using Vector = std::vector<double>;

double Sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

Vector LayerNorm(const Vector& x, const std::vector<float>& weight, const std::vector<float>& bias) {
  double mean = 0.0;
  for (double value : x) mean += value / static_cast<double>(x.size());
  double variance = 0.0;
  for (double value : x) variance += (value - mean) * (value - mean) / static_cast<double>(x.size());
  Vector y(x.size());
  for (size_t c = 0; c < x.size(); ++c) y[c] = (x[c] - mean) / std::sqrt(variance + 1e-5) * weight[c] + bias[c];
  return y;
}

Vector Lerp(const Vector& x, const Vector& previous, const std::vector<float>& mix) {
  Vector y(x.size());
  for (size_t c = 0; c < x.size(); ++c) y[c] = x[c] + (previous[c] - x[c]) * mix[c];
  return y;
}

// W x with W [out, in].
Vector Project(const std::vector<float>& matrix, const Vector& x) {
  Vector y(matrix.size() / x.size());
  for (size_t o = 0; o < y.size(); ++o) {
    for (size_t i = 0; i < x.size(); ++i) y[o] += matrix[o * x.size() + i] * x[i];
  }
  return y;
}

// x M with M [in, out].
Vector TimesMatrix(const Vector& x, const std::vector<float>& matrix) {
  Vector y(matrix.size() / x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t o = 0; o < y.size(); ++o) y[o] += x[i] * matrix[i * y.size() + o];
  }
  return y;
}

Vector TimeMix(const Rwkv7BlockWeights& weights, bool first_layer, const Vector& x, Rwkv7BlockState* state,
               Vector* v_first) {
  const auto n = static_cast<size_t>(weights.head_size);
  const size_t channels = static_cast<size_t>(weights.heads) * n;
  const Vector previous = state->att_x_prev;
  state->att_x_prev = x;
  const Vector r = Project(weights.receptance, Lerp(x, previous, weights.x_r));
  Vector k = Project(weights.key, Lerp(x, previous, weights.x_k));
  Vector v = Project(weights.value, Lerp(x, previous, weights.x_v));

  Vector w = TimesMatrix(Lerp(x, previous, weights.x_w), weights.w1);
  for (double& z : w) z = std::tanh(z);
  w = TimesMatrix(w, weights.w2);
  for (size_t c = 0; c < channels; ++c) w[c] = std::exp(-std::exp(-0.5) * Sigmoid(weights.w0[c] + w[c]));

  Vector iclr = TimesMatrix(TimesMatrix(Lerp(x, previous, weights.x_a), weights.a1), weights.a2);
  for (size_t c = 0; c < channels; ++c) iclr[c] = Sigmoid(weights.a0[c] + iclr[c]);

  Vector g = TimesMatrix(Lerp(x, previous, weights.x_g), weights.g1);
  for (double& z : g) z = Sigmoid(z);
  g = TimesMatrix(g, weights.g2);

  if (first_layer) {
    *v_first = v;
  } else {
    const Vector gate = TimesMatrix(TimesMatrix(Lerp(x, previous, weights.x_v), weights.v1), weights.v2);
    for (size_t c = 0; c < channels; ++c) v[c] += ((*v_first)[c] - v[c]) * Sigmoid(weights.v0[c] + gate[c]);
  }

  Vector y(channels);
  for (size_t head = 0; head < channels; head += n) {
    Vector kappa_hat(n);
    double squares = 0.0;
    for (size_t j = 0; j < n; ++j) {
      kappa_hat[j] = k[head + j] * weights.k_k[head + j];
      squares += kappa_hat[j] * kappa_hat[j];
    }
    for (double& element : kappa_hat) element /= std::max(std::sqrt(squares), 1e-12);
    for (size_t j = 0; j < n; ++j) k[head + j] *= 1.0 + (iclr[head + j] - 1.0) * weights.k_a[head + j];

    // S = S diag(w) - (S kappa_hat)(kappa_hat * iclr)^T + v k^T; S kappa_hat before the decay.
    double* const s = state->att_state.data() + head * n;
    for (size_t i = 0; i < n; ++i) {
      double recall = 0.0;
      for (size_t j = 0; j < n; ++j) recall += s[i * n + j] * kappa_hat[j];
      for (size_t j = 0; j < n; ++j) {
        s[i * n + j] = s[i * n + j] * w[head + j] - recall * kappa_hat[j] * iclr[head + j] + v[head + i] * k[head + j];
        y[head + i] += s[i * n + j] * r[head + j];
      }
    }

    double mean = 0.0;
    for (size_t i = 0; i < n; ++i) mean += y[head + i] / static_cast<double>(n);
    double variance = 0.0;
    for (size_t i = 0; i < n; ++i) variance += (y[head + i] - mean) * (y[head + i] - mean) / static_cast<double>(n);
    double bonus = 0.0;
    for (size_t j = 0; j < n; ++j) bonus += r[head + j] * k[head + j] * weights.r_k[head + j];
    for (size_t i = 0; i < n; ++i) {
      const size_t c = head + i;
      y[c] = (y[c] - mean) / std::sqrt(variance + 64e-5) * weights.ln_x_weight[c] + weights.ln_x_bias[c];
      y[c] = (y[c] + bonus * v[c]) * g[c];
    }
  }
  return Project(weights.output, y);
}

Vector ChannelMix(const Rwkv7BlockWeights& weights, const Vector& x, Rwkv7BlockState* state) {
  const Vector previous = state->ffn_x_prev;
  state->ffn_x_prev = x;
  Vector k = Project(weights.ffn_key, Lerp(x, previous, weights.ffn_x_k));
  for (double& z : k) z = z > 0.0 ? z * z : 0.0;
  return Project(weights.ffn_value, k);
}

}  // namespace

Rwkv7BlockState InitialState(const Rwkv7BlockWeights& weights) {
  Rwkv7BlockState state;
  state.att_x_prev.resize(static_cast<size_t>(weights.width));
  state.att_state.resize(static_cast<size_t>(weights.heads * weights.head_size * weights.head_size));
  state.ffn_x_prev.resize(static_cast<size_t>(weights.width));
  return state;
}

void Rwkv7Block(const Rwkv7BlockWeights& weights, bool first_layer, Rwkv7BlockState* state, std::vector<double>* x,
                std::vector<double>* v_first) {
  const Vector time_mix =
      TimeMix(weights, first_layer, LayerNorm(*x, weights.ln1_weight, weights.ln1_bias), state, v_first);
  for (size_t c = 0; c < x->size(); ++c) (*x)[c] += time_mix[c];
  const Vector channel_mix = ChannelMix(weights, LayerNorm(*x, weights.ln2_weight, weights.ln2_bias), state);
  for (size_t c = 0; c < x->size(); ++c) (*x)[c] += channel_mix[c];
}

}  // namespace rwkv::kernels::reference
