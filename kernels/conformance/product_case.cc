#include "kernels/conformance/product_case.h"

#include <utility>

#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "kernels/conformance/bounded.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

enum Input { kX, kGate, kStart };  // The last is what accumulate adds to.

Bounded Activate(Activation activation, const Bounded& z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return Tanh(z);
    case Activation::kSquaredRelu: {
      const Bounded positive = Max(z, Bounded(0.0));
      return positive * positive;
    }
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kDecay:
      return Exp(-Exp(z));
  }
  return z;
}

}  // namespace

Floats RoundTo(DType dtype, Floats x) {
  std::vector<uint8_t> narrow(x.size() * static_cast<size_t>(SizeOf(dtype)));
  NarrowFromFloat(dtype, x.data(), static_cast<int64_t>(x.size()), narrow.data());
  WidenToFloat(dtype, narrow.data(), static_cast<int64_t>(x.size()), x.data());
  return x;
}

OpCase MakeProductCase(const ProductCase& c) {
  Random random(7);
  const StoredMatrix weight(c.storage, c.outputs, c.inputs, random.Uniforms(c.outputs * c.inputs, -1.0f, 1.0f));
  const Floats bias = random.Uniforms(c.outputs, -3.0f, 3.0f);
  OpCase op;
  op.y_width = c.outputs;
  op.packing = {{0}, 1, 0};
  Floats x = random.Uniforms(c.rows * c.inputs, -2.0f, 2.0f);
  x = RoundTo(c.inputs_of, std::move(x));
  if (c.zeros > 0.0f) {
    const Floats draws = random.Uniforms(c.rows * c.inputs, 0.0f, 1.0f);
    for (int64_t i = 0; i < c.rows * c.inputs; ++i) x[i] = draws[i] < c.zeros ? 0.0f : x[i];
  }
  op.sequences.push_back({c.rows,
                          {std::move(x), random.Uniforms(c.rows * c.outputs, -2.0f, 2.0f),
                           random.Uniforms(c.rows * c.outputs, -3.0f, 3.0f)},
                          {},
                          {}});
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    const int64_t y_bytes = call.step.rows * c.outputs * 4;
    RWKV_RETURN_IF_ERROR(memory.stream().Copy(call.y, call.inputs[kStart], y_bytes));
    Product product;
    product.weight = memory.Load(weight.view(), c.zeros > 0.0f ? WeightUse::kSparseProduct : WeightUse::kProduct);
    product.x = call.inputs[kX];
    if (c.bias) product.bias = memory.Put(bias);
    product.activation = c.activation;
    if (c.gate) product.gate = call.inputs[kGate];
    product.accumulate = c.accumulate;
    product.y = c.in_place ? call.inputs[kGate] : call.y;
    RWKV_RETURN_IF_ERROR(memory.device().ops().products({call.step.rows, &product, 1}, memory.stream()));
    return memory.stream().Copy(call.y, product.y, c.in_place ? y_bytes : 0);
  };
  op.formula = [=](const Sequence& row) {
    RowResult result;
    const Bounds x = ProductInputs(weight.view(), row.inputs[kX].data());
    for (int64_t o = 0; o < c.outputs; ++o) {
      Bounded z = Dot(x.data(), weight.widened.data() + o * c.inputs, c.inputs);
      if (c.bias) z = z + Bounded(bias[o]);
      z = Activate(c.activation, z);
      if (c.gate) z = z * Bounded(row.inputs[kGate][o]);
      result.y.push_back(c.accumulate ? Bounded(row.inputs[kStart][o]) + z : z);
    }
    return result;
  };
  return op;
}

Floats Multiply(DeviceMemory& memory, const Weight* weight, int64_t rows, const Floats& x, Activation activation) {
  Product product;
  product.weight = weight;
  product.x = memory.Put(x);
  product.activation = activation;
  product.y = memory.Zeros(rows * weight->matrix.rows);
  EXPECT_OK(memory.device().ops().products({rows, &product, 1}, memory.stream()));
  return memory.Get(product.y, rows * weight->matrix.rows);
}

}  // namespace rwkv::kernels::conformance
