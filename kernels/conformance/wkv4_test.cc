// Wkv4 of every backend.
#include "kernels/api/wkv4.h"

#include <algorithm>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
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
  int64_t width = 48;
  float key_range = 3.0f;
  float smallest_decay = -5.0f;
  float largest_decay = -0.001f;
  bool fresh = false;     // states as of a new sequence
  bool in_place = false;  // y is r
};

// Inputs r, k, v; states aa, bb, pp.
OpCase Make(const Case& c) {
  Random random(43);
  const Floats decay = random.Uniforms(c.width, c.smallest_decay, c.largest_decay);
  const Floats bonus = random.Uniforms(c.width, -1.0f, 1.0f);
  OpCase op;
  op.y_width = c.width;
  op.packing = c.packing;
  for (int64_t length : c.lengths) {
    Sequence s;
    s.length = length;
    s.inputs = {random.Uniforms(length * c.width, 0.0f, 1.0f),
                random.Uniforms(length * c.width, -c.key_range, c.key_range),
                random.Uniforms(length * c.width, -2.0f, 2.0f)};
    s.states = {random.Uniforms(c.width, -2.0f, 2.0f), random.Uniforms(c.width, 0.5f, 3.0f),
                random.Uniforms(c.width, -c.key_range, c.key_range)};
    if (c.fresh) s.states = {Floats(c.width), Floats(c.width), Floats(c.width, -1e30f)};
    op.sequences.push_back(s);
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    Wkv4Args args;
    args.step = &call.step;
    args.width = c.width;
    args.aa = call.states[0];
    args.bb = call.states[1];
    args.pp = call.states[2];
    args.decay = memory.Put(decay);
    args.bonus = memory.Put(bonus);
    args.r = call.inputs[0];
    args.k = call.inputs[1];
    args.v = call.inputs[2];
    args.y = c.in_place ? call.inputs[0] : call.y;
    RWKV_RETURN_IF_ERROR(memory.device().ops().wkv4(args, memory.stream()));
    return memory.stream().Copy(call.y, args.y, c.in_place ? call.step.rows * c.width * 4 : 0);
  };
  op.formula = [=](const Sequence& row) {
    RowResult result;
    result.states.resize(3);
    for (int64_t i = 0; i < c.width; ++i) {
      const Bounded k = row.inputs[1][i];
      const Bounded v = row.inputs[2][i];
      const Bounded aa = row.states[0][i];
      const Bounded bb = row.states[1][i];
      const Bounded pp = row.states[2][i];
      const Bounded own = Bounded(bonus[i]) + k;
      const Bounded old_scale = Exp(pp - Max(pp, own));
      const Bounded new_scale = Exp(own - Max(pp, own));
      result.y.push_back(Bounded(row.inputs[0][i]) * ((old_scale * aa + new_scale * v) / (old_scale * bb + new_scale)));
      const Bounded decayed = pp + Bounded(decay[i]);
      const Bounded kept = Exp(decayed - Max(decayed, k));
      const Bounded added = Exp(k - Max(decayed, k));
      result.states[0].push_back(kept * aa + added * v);
      result.states[1].push_back(kept * bb + added);
      result.states[2].push_back(Max(decayed, k));
    }
    return result;
  };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  table.Add("fresh", [](Case& c) { c.fresh = true; });
  table.Add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  table.Add("long_sequence", [](Case& c) { c.lengths = {150}, c.packing.slots = {1}; });
  table.Add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  table.Add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 13; });
  table.Add("in_place", [](Case& c) { c.in_place = true; });
  // exp() of these keys alone would overflow.
  table.Add("large_keys", [](Case& c) { c.key_range = 200.0f; });
  table.Add("large_keys_fresh", [](Case& c) { c.key_range = 200.0f, c.fresh = true; });
  table.Add("forgets_at_once", [](Case& c) { c.smallest_decay = -2000.0f, c.largest_decay = -300.0f; });
  table.Add("hardly_forgets", [](Case& c) { c.smallest_decay = -1e-6f, c.largest_decay = -1e-9f; });
  for (int64_t width : {1, 15, 16, 17, 40, 260}) {
    table.Add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  }
  return table.Build(Make);
}

RWKV_TEST_OPERATION(Wkv4, Cases());

}  // namespace
}  // namespace rwkv::kernels::conformance
