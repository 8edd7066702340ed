// LayerNorm and Embed of every backend.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "kernels/conformance/bounded.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kVocabulary = 7;

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 20};
  int64_t width = 64;
  float center = 0.3f;  // of the inputs, which spread by `spread` around it
  float spread = 2.0f;
  bool in_place = false;                         // LayerNorm: y is x
  bool norm = true;                              // Embed: with ln0
  Storage storage = {"bf16", DType::kBFloat16};  // of the embedding
};

OpCase MakeLayerNorm(const Case& c) {
  Random random(11);
  const Floats weight = random.Uniforms(c.width, 0.2f, 1.5f);
  const Floats bias = random.Uniforms(c.width, -0.5f, 0.5f);
  OpCase op;
  op.y_width = c.width;
  for (int64_t length : c.lengths) {
    op.sequences.push_back(
        {length, {random.Uniforms(length * c.width, c.center - c.spread, c.center + c.spread)}, {}, {}});
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    LayerNormArgs args;
    args.rows = call.step.rows;
    args.width = c.width;
    args.x = call.inputs[0];
    args.weight = memory.Put(weight);
    args.bias = memory.Put(bias);
    args.y = c.in_place ? call.inputs[0] : call.y;
    RWKV_RETURN_IF_ERROR(memory.device().ops().layer_norm(args, memory.stream()));
    return memory.stream().Copy(call.y, args.y, c.in_place ? args.rows * c.width * 4 : 0);
  };
  op.formula = [=](const Sequence& row) {
    const Bounds x(row.inputs[0].begin(), row.inputs[0].end());
    return RowResult{Normalize(x, weight.data(), bias.data(), 1e-5f), {}};
  };
  return op;
}

OpCase MakeEmbed(const Case& c) {
  Random random(11);
  const Floats weight = random.Uniforms(c.width, 0.2f, 1.5f);
  const Floats bias = random.Uniforms(c.width, -0.5f, 0.5f);
  const StoredMatrix embedding(c.storage, kVocabulary, c.width,
                               random.Uniforms(kVocabulary * c.width, c.center - c.spread, c.center + c.spread));
  OpCase op;
  op.y_width = c.width;
  for (int64_t length : c.lengths) {
    std::vector<int32_t> tokens;
    for (int64_t t = 0; t < length; ++t) tokens.push_back(static_cast<int32_t>((5 * t + length) % kVocabulary));
    op.sequences.push_back({length, {}, {}, tokens});
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    EmbedArgs args;
    args.rows = call.step.rows;
    args.tokens = call.step.tokens;
    args.embedding = memory.Load(embedding.view(), WeightUse::kRows);
    if (c.norm) args.weight = memory.Put(weight);
    if (c.norm) args.bias = memory.Put(bias);
    args.x = call.y;
    return memory.device().ops().embed(args, memory.stream());
  };
  op.formula = [=](const Sequence& row) {
    const auto begin = embedding.widened.begin() + row.tokens[0] * c.width;
    const Bounds x(begin, begin + c.width);
    return RowResult{c.norm ? Normalize(x, weight.data(), bias.data(), 1e-5f) : x, {}};
  };
  return op;
}

void AddShapes(Table<Case>* table) {
  table->Add("base", [](Case&) {});
  table->Add("one_row", [](Case& c) { c.lengths = {1}; });
  // The last is wider than a block of four channels a thread.
  for (int64_t width : {1, 2, 15, 16, 17, 40, 768, 2100}) {
    table->Add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  }
  table->Add("far_from_zero", [](Case& c) { c.center = 50.0f; });
  table->Add("smaller_than_epsilon", [](Case& c) { c.center = 0.0f, c.spread = 1e-4f; });
  table->Add("constant", [](Case& c) { c.spread = 0.0f; });
}

std::vector<std::shared_ptr<const OpCase>> LayerNormCases() {
  Table<Case> table;
  AddShapes(&table);
  table.Add("in_place", [](Case& c) { c.in_place = true; });
  return table.Build(MakeLayerNorm);
}

std::vector<std::shared_ptr<const OpCase>> EmbedCases() {
  Table<Case> table;
  AddShapes(&table);
  for (const Storage& storage : Storages()) {
    table.Add(storage.name, [=](Case& c) { c.storage = storage; });
    for (int64_t width : {21, 22, 23}) {  // One, two and three channels behind the last four.
      table.Add(storage.name + "_tail_" + std::to_string(width),
                [=](Case& c) { c.storage = storage, c.width = width; });
    }
    table.Add(storage.name + "_odd_groups", [=](Case& c) { c.storage = storage, c.width = 85; });
    table.Add(storage.name + "_without_norm", [=](Case& c) { c.storage = storage, c.width = 85, c.norm = false; });
  }
  for (const Storage& storage : BlockStorages()) {
    table.Add(storage.name, [=](Case& c) { c.storage = storage, c.width = 512; });
    table.Add(storage.name + "_without_norm", [=](Case& c) { c.storage = storage, c.width = 256, c.norm = false; });
    if (BlockWeights(storage.blocks) != 32) continue;
    for (int64_t width : {32, 96, 160}) {
      table.Add(absl::StrCat(storage.name, "_odd_blocks_", width),
                [=](Case& c) { c.storage = storage, c.width = width; });
    }
  }
  return table.Build(MakeEmbed);
}

RWKV_TEST_OPERATION(LayerNorm, LayerNormCases());
RWKV_TEST_OPERATION(Embed, EmbedCases());

}  // namespace
}  // namespace rwkv::kernels::conformance
