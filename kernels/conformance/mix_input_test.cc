// MixInput of every backend: layer norm, token shift, mixes.
#include "kernels/api/mix_input.h"

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
  std::vector<int64_t> lengths = {3, 1, 4};
  Packing packing;
  int64_t width = 48;
  int64_t outputs = 6;
  int64_t deltas = 0;     // how many of the outputs have a delta, from the last one on
  bool in_place = false;  // y of those is their delta
  bool norm = true;
  bool keep_state = false;
  bool normed = false;  // n is an output, too
  float center = 0.3f;
  float spread = 2.0f;
};

// Inputs: x, and a delta for each output (of which c.deltas are used). One state: the last n. y is [rows, outputs + 1,
// width]: the rows of all outputs, then n (zeros if nobody asks).
OpCase Make(const Case& c) {
  Random random(13);
  const Floats weight = random.Uniforms(c.width, 0.2f, 1.5f);
  const Floats bias = random.Uniforms(c.width, -0.5f, 0.5f);
  std::vector<Floats> mix;  // Not confined to [0, 1] in trained models.
  for (int64_t m = 0; m < c.outputs; ++m) mix.push_back(random.Uniforms(c.width, -0.3f, 1.4f));
  OpCase op;
  op.y_width = (c.outputs + 1) * c.width;
  op.packing = c.packing;
  op.keeps_state = c.keep_state;
  for (int64_t length : c.lengths) {
    Sequence sequence;
    sequence.length = length;
    sequence.inputs.push_back(random.Uniforms(length * c.width, c.center - c.spread, c.center + c.spread));
    for (int64_t m = 0; m < c.outputs; ++m) {
      sequence.inputs.push_back(random.Uniforms(length * c.width, -0.5f, 0.5f));
    }
    sequence.states.push_back(random.Uniforms(c.width, -2.0f, 2.0f));
    op.sequences.push_back(sequence);
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    const int64_t rows = call.step.rows;
    MixInputArgs args;
    args.step = &call.step;
    args.width = c.width;
    args.x = call.inputs[0];
    if (c.norm) args.weight = memory.Put(weight);
    if (c.norm) args.bias = memory.Put(bias);
    args.shift = call.states[0];
    args.keep_state = c.keep_state;
    args.outputs = c.outputs;
    const float* places[kMaxMixOutputs + 1];
    for (int64_t m = 0; m < c.outputs; ++m) {
      const bool has_delta = m >= c.outputs - c.deltas;
      args.mix[m] = memory.Put(mix[m]);
      if (has_delta) args.mix_delta[m] = call.inputs[m + 1];
      args.y[m] = has_delta && c.in_place ? call.inputs[m + 1] : memory.Unwritten(rows * c.width);
      places[m] = args.y[m];
    }
    float* const normed = c.normed ? memory.Unwritten(rows * c.width) : memory.Zeros(rows * c.width);
    places[c.outputs] = normed;
    if (c.normed) args.normed = normed;
    absl::Status status = memory.device().ops().mix_input(args, memory.stream());
    for (int64_t row = 0; row < rows && status.ok(); ++row) {
      for (int64_t m = 0; m <= c.outputs && status.ok(); ++m) {
        status = memory.stream().Copy(call.y + (row * (c.outputs + 1) + m) * c.width, places[m] + row * c.width,
                                      c.width * static_cast<int64_t>(sizeof(float)));
      }
    }
    return status;
  };
  op.formula = [=](const Sequence& row) {
    Bounds now(row.inputs[0].begin(), row.inputs[0].end());
    if (c.norm) now = Normalize(now, weight.data(), bias.data(), 1e-5f);
    RowResult result;
    for (int64_t m = 0; m < c.outputs; ++m) {
      for (int64_t i = 0; i < c.width; ++i) {
        Bounded share = mix[m][i];
        if (m >= c.outputs - c.deltas) share = share + Bounded(row.inputs[m + 1][i]);
        result.y.push_back(now[i] + (Bounded(row.states[0][i]) - now[i]) * share);
      }
    }
    if (c.normed) {
      result.y.insert(result.y.end(), now.begin(), now.end());
    } else {
      result.y.resize(result.y.size() + c.width);
    }
    result.states = {c.keep_state ? Bounds(row.states[0].begin(), row.states[0].end()) : now};
    return result;
  };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  table.Add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  table.Add("one_sequence", [](Case& c) { c.lengths = {7}, c.packing.slots = {1}; });
  table.Add("long_sequence", [](Case& c) { c.lengths = {61}, c.packing.slots = {1}; });
  table.Add("long_sequences", [](Case& c) { c.lengths = {9, 17, 8}; });
  table.Add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  table.Add("one_output", [](Case& c) { c.outputs = 1; });
  table.Add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 13; });
  table.Add("normed", [](Case& c) { c.normed = true, c.outputs = 2; });
  table.Add("without_norm", [](Case& c) { c.norm = false; });
  table.Add("keep_state", [](Case& c) { c.keep_state = c.normed = true, c.outputs = 1; });
  table.Add("keep_state_long", [](Case& c) { c.keep_state = true, c.outputs = 1, c.lengths = {20, 3, 9}; });
  table.Add("one_delta", [](Case& c) { c.deltas = 1; });
  table.Add("second_pass_of_rwkv6", [](Case& c) { c.deltas = c.outputs = 5, c.in_place = true, c.norm = false; });
  table.Add("far_from_zero", [](Case& c) { c.center = 50.0f; });
  table.Add("smaller_than_epsilon", [](Case& c) { c.center = 0.0f, c.spread = 1e-4f; });
  table.Add("constant", [](Case& c) { c.spread = 0.0f; });
  for (int64_t width : {1, 15, 17, 40, 768}) {
    table.Add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
    table.Add("deltas_width_" + std::to_string(width), [=](Case& c) { c.width = width, c.deltas = 2; });
  }
  // Wider than a block of four channels a thread.
  table.Add("width_2100", [](Case& c) { c.width = 2100, c.outputs = 1, c.lengths = {2}, c.packing.slots = {1}; });
  return table.Build(Make);
}

RWKV_TEST_OPERATION(MixInput, Cases());

}  // namespace
}  // namespace rwkv::kernels::conformance
