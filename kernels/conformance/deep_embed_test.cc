// DeepEmbed of every backend.
#include "kernels/api/deep_embed.h"

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
  std::vector<int64_t> lengths = {3, 1, 12};
  int64_t width = 32;
};

// Inputs: the matrices and x.
OpCase Make(const Case& c) {
  Random random(59);
  const int64_t n = c.width;
  OpCase op;
  op.y_width = n;
  for (int64_t length : c.lengths) {
    op.sequences.push_back(
        {length, {random.Uniforms(length * n * n, -1.0f, 1.0f), random.Uniforms(length * n, -2.0f, 2.0f)}, {}, {}});
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    DeepEmbedArgs args;
    args.rows = call.step.rows;
    args.width = n;
    args.matrices = call.inputs[0];
    args.x = call.inputs[1];
    args.y = call.y;
    return memory.device().ops().deep_embed(args, memory.stream());
  };
  op.formula = [=](const Sequence& row) {
    RowResult result;
    for (int64_t j = 0; j < n; ++j) {
      Floats column;
      for (int64_t i = 0; i < n; ++i) column.push_back(row.inputs[0][i * n + j]);
      result.y.push_back(Dot(row.inputs[1].data(), column.data(), n));
    }
    return result;
  };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  table.Add("one_row", [](Case& c) { c.lengths = {1}; });
  for (int64_t width : {1, 5, 16, 17}) {
    table.Add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  }
  return table.Build(Make);
}

RWKV_TEST_OPERATION(DeepEmbed, Cases());

}  // namespace
}  // namespace rwkv::kernels::conformance
