// Wkv6 of every backend: the recurrence of RWKV-5 and 6, group norm, gate.
#include "kernels/api/wkv6.h"

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
  bool constant_decay = false;
  bool gate = true;
  float epsilon = 64e-5f;
  float state_range = 0.5f;
  float smallest_decay = 0.0f;  // e^-20 a step is legal, so zero is
  float largest_decay = 1.0f;
};

// Inputs r, w, k, v, gate; one state [H, N, N].
OpCase Make(const Case& c) {
  Random random(47);
  const int64_t n = c.head_size;
  const int64_t width = c.heads * n;
  const Floats bonus = random.Uniforms(width, -1.0f, 1.0f);
  const Floats ln_weight = random.Uniforms(width, 0.2f, 1.5f);
  const Floats ln_bias = random.Uniforms(width, -0.5f, 0.5f);
  const Floats decay = random.Uniforms(width, c.smallest_decay, c.largest_decay);  // if it is constant
  OpCase op;
  op.y_width = width;
  op.packing = c.packing;
  for (int64_t length : c.lengths) {
    Sequence s;
    s.length = length;
    for (int i = 0; i < 5; ++i) {
      s.inputs.push_back(i == 1 ? random.Uniforms(length * width, c.smallest_decay, c.largest_decay)
                                : random.Uniforms(length * width, -1.0f, 1.0f));
    }
    s.states.push_back(random.Uniforms(width * n, -c.state_range, c.state_range));
    op.sequences.push_back(s);
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    Wkv6Args args;
    args.step = &call.step;
    args.heads = c.heads;
    args.head_size = n;
    args.state = call.states[0];
    args.bonus = memory.Put(bonus);
    args.ln_weight = memory.Put(ln_weight);
    args.ln_bias = memory.Put(ln_bias);
    args.epsilon = c.epsilon;
    args.r = call.inputs[0];
    args.w = c.constant_decay ? memory.Put(decay) : call.inputs[1];
    args.constant_decay = c.constant_decay;
    args.k = call.inputs[2];
    args.v = call.inputs[3];
    if (c.gate) args.gate = call.inputs[4];
    args.y = call.y;
    return memory.device().ops().wkv6(args, memory.stream());
  };
  op.formula = [=](const Sequence& row) {
    RowResult result;
    result.states.resize(1);
    for (int64_t at = 0; at < width; at += n) {
      const float* const r = row.inputs[0].data() + at;
      const float* const w = (c.constant_decay ? decay.data() : row.inputs[1].data()) + at;
      const float* const k = row.inputs[2].data() + at;
      const float* const v = row.inputs[3].data() + at;
      Bounds weighted;
      for (int64_t j = 0; j < n; ++j) weighted.push_back(Bounded(k[j]) * Bounded(bonus[at + j]));
      const Bounded own = Dot(r, weighted.data(), n);
      Bounds read;
      for (int64_t i = 0; i < n; ++i) {
        const float* const s = row.states[0].data() + (at + i) * n;
        read.push_back(Dot(s, r, n) + own * Bounded(v[i]));
        for (int64_t j = 0; j < n; ++j) {
          result.states[0].push_back(Bounded(s[j]) * Bounded(w[j]) + Bounded(v[i]) * Bounded(k[j]));
        }
      }
      const Bounds z = Normalize(read, ln_weight.data() + at, ln_bias.data() + at, c.epsilon);
      for (int64_t i = 0; i < n; ++i) {
        result.y.push_back(c.gate ? z[i] * Bounded(row.inputs[4][at + i]) : z[i]);
      }
    }
    return result;
  };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  table.Add("constant_decay", [](Case& c) { c.constant_decay = true; });
  table.Add("no_gate", [](Case& c) { c.gate = false, c.constant_decay = true; });
  table.Add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  table.Add("one_sequence_odd_tokens", [](Case& c) { c.lengths = {7}, c.packing.slots = {1}; });
  table.Add("long_sequence", [](Case& c) { c.lengths = {150}, c.packing.slots = {1}, c.heads = 1, c.head_size = 17; });
  table.Add("one_head", [](Case& c) { c.heads = 1; });
  table.Add("three_heads_constant_decay", [](Case& c) { c.heads = 3, c.constant_decay = true; });
  table.Add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  table.Add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 77; });
  table.Add("forgets_at_once", [](Case& c) { c.largest_decay = 0.0f; });
  table.Add("never_forgets", [](Case& c) { c.smallest_decay = 1.0f; });
  table.Add("epsilon_of_rwkv_cpp", [](Case& c) { c.epsilon = 1e-5f, c.state_range = 0.01f; });
  table.Add("empty_state", [](Case& c) { c.state_range = 0.0f; });
  for (int64_t head_size : {1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 63, 65, 128}) {
    table.Add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return table.Build(Make);
}

RWKV_TEST_OPERATION(Wkv6, Cases());

}  // namespace
}  // namespace rwkv::kernels::conformance
