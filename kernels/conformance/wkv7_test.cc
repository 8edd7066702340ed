// Wkv7 of every backend: prepare, recurrence, group norm, bonus and gate of RWKV-7.
#include "kernels/api/wkv7.h"

#include <cmath>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/conformance/bounded.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"

namespace rwkv::kernels::conformance {
namespace {

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 5};
  Packing packing;
  int64_t heads = 2;
  int64_t head_size = 64;
  float lora_range = 4.0f;  // of the arguments of the sigmoids
  float key_range = 1.0f;
  float state_range = 0.5f;
  float epsilon = 64e-5f;
  bool first_layer = false;  // no value residual
};

enum Input { kR, kK, kV, kG, kDecayLora, kIclrLora, kGateLora, kFirst, kInputs };
enum Vector { kDecayBias, kIclrBias, kKeyScale, kKeyIclr, kBonus, kLnWeight, kLnBias, kGateBias, kVectors };

// One state [H, N, N].
OpCase Make(const Case& c) {
  Random random(19);
  const int64_t n = c.head_size;
  const int64_t width = c.heads * n;
  std::vector<Floats> weights(kVectors);
  weights[kDecayBias] = random.Uniforms(width, -6.0f, 1.0f);
  weights[kKeyScale] = random.Uniforms(width, 0.5f, 1.2f);
  weights[kKeyIclr] = random.Uniforms(width, 0.5f, 1.2f);
  weights[kLnWeight] = random.Uniforms(width, 0.2f, 1.5f);
  for (Vector v : {kIclrBias, kGateBias}) weights[v] = random.Uniforms(width, -1.0f, 1.0f);
  for (Vector v : {kBonus, kLnBias}) weights[v] = random.Uniforms(width, -0.5f, 0.5f);
  OpCase op;
  op.y_width = width;
  op.packing = c.packing;
  for (int64_t length : c.lengths) {
    Sequence s;
    s.length = length;
    s.inputs.resize(kInputs);
    const auto uniforms = [&](float range) { return random.Uniforms(length * width, -range, range); };
    for (Input i : {kR, kV, kG}) s.inputs[i] = uniforms(1.0f);
    for (Input i : {kDecayLora, kIclrLora, kGateLora}) s.inputs[i] = uniforms(c.lora_range);
    s.inputs[kK] = uniforms(c.key_range);
    s.inputs[kFirst] = uniforms(2.0f);
    s.states.push_back(random.Uniforms(width * n, -c.state_range, c.state_range));
    op.sequences.push_back(s);
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    Wkv7Args args;
    args.step = &call.step;
    args.heads = c.heads;
    args.head_size = n;
    args.state = call.states[0];
    args.decay_bias = memory.Put(weights[kDecayBias]);
    args.iclr_bias = memory.Put(weights[kIclrBias]);
    args.k_k = memory.Put(weights[kKeyScale]);
    args.k_a = memory.Put(weights[kKeyIclr]);
    args.bonus = memory.Put(weights[kBonus]);
    args.ln_weight = memory.Put(weights[kLnWeight]);
    args.ln_bias = memory.Put(weights[kLnBias]);
    args.epsilon = c.epsilon;
    args.r = call.inputs[kR];
    args.k = call.inputs[kK];
    args.v = call.inputs[kV];
    args.g = call.inputs[kG];
    args.decay_lora = call.inputs[kDecayLora];
    args.iclr_lora = call.inputs[kIclrLora];
    if (!c.first_layer) {
      args.value_gate_bias = memory.Put(weights[kGateBias]);
      args.value_gate_lora = call.inputs[kGateLora];
      args.v_first = call.inputs[kFirst];
    }
    args.y = call.y;
    return memory.device().ops().wkv7(args, memory.stream());
  };
  op.formula = [=](const Sequence& row) {
    RowResult result;
    result.states.resize(1);
    for (int64_t at = 0; at < width; at += n) {
      const auto in = [&](Input i, int64_t j) { return Bounded(row.inputs[i][at + j]); };
      const auto of = [&](Vector v, int64_t j) { return Bounded(weights[v][at + j]); };
      Bounds kappa, w, a, b, k, v;
      for (int64_t j = 0; j < n; ++j) kappa.push_back(in(kK, j) * of(kKeyScale, j));
      const Bounded norm = Max(Sqrt(Dot(kappa.data(), kappa.data(), n)), Bounded(1e-12f));
      for (int64_t j = 0; j < n; ++j) {
        const Bounded decay = Sigmoid(of(kDecayBias, j) + in(kDecayLora, j));
        const Bounded iclr = Sigmoid(of(kIclrBias, j) + in(kIclrLora, j));
        const Bounded kappa_hat = kappa[j] / norm;
        w.push_back(Exp(decay * Rounded(-std::exp(-0.5), 0.0)));
        a.push_back(-kappa_hat);
        b.push_back(kappa_hat * iclr);
        k.push_back(in(kK, j) * (Bounded(1.0) + (iclr - Bounded(1.0)) * of(kKeyIclr, j)));
        const Bounded gate = Sigmoid(of(kGateBias, j) + in(kGateLora, j));
        v.push_back(c.first_layer ? in(kV, j) : in(kV, j) + (in(kFirst, j) - in(kV, j)) * gate);
      }
      const float* const r = row.inputs[kR].data() + at;
      Bounds read;
      for (int64_t i = 0; i < n; ++i) {
        const float* const s = row.states[0].data() + (at + i) * n;
        const Bounded recall = Dot(s, a.data(), n);
        Bounds next;
        for (int64_t j = 0; j < n; ++j) next.push_back(Bounded(s[j]) * w[j] + v[i] * k[j] + recall * b[j]);
        read.push_back(Dot(next.data(), r, n));
        result.states[0].insert(result.states[0].end(), next.begin(), next.end());
      }
      const Bounds z = Normalize(read, weights[kLnWeight].data() + at, weights[kLnBias].data() + at, c.epsilon);
      Bounds weighted;
      for (int64_t j = 0; j < n; ++j) weighted.push_back(k[j] * of(kBonus, j));
      const Bounded own = Dot(r, weighted.data(), n);
      for (int64_t i = 0; i < n; ++i) result.y.push_back((z[i] + own * v[i]) * in(kG, i));
    }
    return result;
  };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  table.Add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  table.Add("one_sequence_odd_tokens", [](Case& c) { c.lengths = {7}, c.packing.slots = {1}; });
  table.Add("long_sequence", [](Case& c) { c.lengths = {150}, c.packing.slots = {1}, c.heads = 1, c.head_size = 17; });
  table.Add("one_head", [](Case& c) { c.heads = 1; });
  table.Add("three_heads", [](Case& c) { c.heads = 3; });
  table.Add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  table.Add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 77; });
  table.Add("first_layer", [](Case& c) { c.first_layer = true; });
  table.Add("saturated", [](Case& c) { c.lora_range = 120.0f; });
  table.Add("zero_key", [](Case& c) { c.key_range = 0.0f; });
  table.Add("tiny_key", [](Case& c) { c.key_range = 1e-14f; });
  table.Add("empty_state", [](Case& c) { c.state_range = 0.0f; });
  table.Add("another_epsilon", [](Case& c) { c.epsilon = 0.1f, c.state_range = 0.01f; });
  table.Add("nothing_to_read", [](Case& c) { c.state_range = c.key_range = 0.0f; });
  for (int64_t head_size : {1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 63, 65, 128}) {
    table.Add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return table.Build(Make);
}

RWKV_TEST_OPERATION(Wkv7, Cases());

}  // namespace
}  // namespace rwkv::kernels::conformance
