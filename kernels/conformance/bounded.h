// Numbers that know how far a float computation of them may be off, so that a tolerance is derived by writing down the
// formula: the value is exact to the precision of double, the error a bound for any float evaluation that rounds each
// operation once or, where it fuses two, not at all, and adds up sums in any order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/base/fixed_point.h"
#include "kernels/base/matrix.h"
#include "kernels/conformance/conformance.h"

namespace rwkv::kernels::conformance {

struct Bounded {
  Bounded(double exact = 0.0, double bound = 0.0) : value(exact), error(bound) {}  // NOLINT: a number is one.

  double high() const { return value + error; }
  double low() const { return value - error; }

  double value;
  double error;
};
using Bounds = std::vector<Bounded>;

// Once more rounded; a result below the normal floats may be flushed to zero.
inline Bounded Rounded(double value, double error) {
  return {value, error + kUnitRoundoff * (std::abs(value) + error) + 0x1p-126};
}

inline Bounded operator+(const Bounded& a, const Bounded& b) { return Rounded(a.value + b.value, a.error + b.error); }
inline Bounded operator-(const Bounded& a, const Bounded& b) { return Rounded(a.value - b.value, a.error + b.error); }
inline Bounded operator-(const Bounded& a) { return {-a.value, a.error}; }

inline Bounded operator*(const Bounded& a, const Bounded& b) {
  return Rounded(a.value * b.value, std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error);
}

inline Bounded operator/(const Bounded& a, const Bounded& b) {
  const double smallest = std::abs(b.value) - b.error;
  if (smallest <= 0.0) return {a.value / b.value, std::numeric_limits<double>::infinity()};
  const double value = a.value / b.value;
  return Rounded(value, (a.error + std::abs(value) * b.error) / smallest);
}

inline Bounded Max(const Bounded& a, const Bounded& b) {
  const double value = std::max(a.value, b.value);
  return {value, std::max(std::max(a.high(), b.high()) - value, value - std::max(a.low(), b.low()))};
}

// A monotone function that is itself off by `ulps` units.
template <typename Function>
Bounded Monotone(Function function, const Bounded& x, double ulps) {
  const double value = function(x.value);
  const double spread = std::max(std::abs(function(x.high()) - value), std::abs(function(x.low()) - value));
  return {value, spread + 2 * ulps * kUnitRoundoff * (std::abs(value) + spread) + 0x1p-126};
}

inline Bounded Sqrt(const Bounded& x) {
  return Monotone([](double z) { return std::sqrt(std::max(z, 0.0)); }, x, 0.5);
}
inline Bounded Exp(const Bounded& x) {
  return Monotone([](double z) { return std::exp(z); }, x, kFunctionUlps);
}
inline Bounded Sigmoid(const Bounded& x) {
  return Monotone([](double z) { return 1.0 / (1.0 + std::exp(-z)); }, x, kFunctionUlps);
}
inline Bounded Tanh(const Bounded& x) {
  return Monotone([](double z) { return std::tanh(z); }, x, kFunctionUlps);
}

// In any order, which may begin with a zero.
inline Bounded Sum(const Bounds& terms) {
  double value = 0.0;
  double error = 0.0;
  double magnitude = 0.0;
  for (const Bounded& term : terms) {
    value += term.value;
    error += term.error;
    magnitude += std::abs(term.value) + term.error;
  }
  const auto count = static_cast<double>(terms.size());
  return {value, error + 1.01 * count * kUnitRoundoff * magnitude};
}

template <typename A, typename B>
Bounded Dot(const A* a, const B* b, int64_t count) {
  Bounds products;
  for (int64_t i = 0; i < count; ++i) products.push_back(Bounded(a[i]) * Bounded(b[i]));
  return Sum(products);
}

// A row of a product's inputs, as far off as fixed point may put them where the matrix asks for it.
inline Bounds ProductInputs(const MatrixView& weight, const float* x) {
  Bounds inputs(x, x + weight.cols);
  const int64_t group = FixedPointGroup(weight);
  for (int64_t begin = 0; group != 0 && begin < weight.cols; begin += group) {
    const int64_t end = std::min(begin + group, weight.cols);
    double largest = 0.0;
    for (int64_t k = begin; k < end; ++k) largest = std::max(largest, std::abs(static_cast<double>(x[k])));
    for (int64_t k = begin; k < end; ++k) inputs[k].error = 0.501 * largest / kLargestFixedPoint;
  }
  return inputs;
}

// (x - mean) / sqrt(var + eps) * weight + bias
inline Bounds Normalize(const Bounds& x, const float* weight, const float* bias, float epsilon) {
  const auto n = static_cast<int64_t>(x.size());
  const Bounded mean = Sum(x) / Bounded(static_cast<double>(n));
  Bounds distance;
  for (const Bounded& value : x) distance.push_back(value - mean);
  const Bounded variance = Dot(distance.data(), distance.data(), n) / Bounded(static_cast<double>(n));
  const Bounded scale = Bounded(1.0) / Sqrt(variance + Bounded(epsilon));
  Bounds y;
  for (int64_t i = 0; i < n; ++i) y.push_back(distance[i] * scale * Bounded(weight[i]) + Bounded(bias[i]));
  return y;
}

}  // namespace rwkv::kernels::conformance
