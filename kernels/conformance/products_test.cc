// Products of every backend, each against its formula, and law N1.
#include "kernels/api/products.h"

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/conformance/product_case.h"

namespace rwkv::kernels::conformance {
namespace {

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<ProductCase> table;
  table.Add("base", [](ProductCase&) {});
  for (int64_t rows : {1, 2, 3, 4, 6, 7, 8, 13, 33}) {
    table.Add("rows_" + std::to_string(rows), [=](ProductCase& c) { c.rows = rows; });
  }
  for (int64_t inputs : {1, 8, 15, 16, 17, 31, 33, 100, 768}) {
    table.Add("inputs_" + std::to_string(inputs), [=](ProductCase& c) { c.inputs = inputs; });
  }
  for (int64_t outputs : {1, 2, 3, 7, 8, 9, 15, 67}) {
    table.Add("outputs_" + std::to_string(outputs), [=](ProductCase& c) { c.outputs = outputs; });
    table.Add("one_row_outputs_" + std::to_string(outputs), [=](ProductCase& c) { c.outputs = outputs, c.rows = 1; });
    table.Add("many_rows_outputs_" + std::to_string(outputs),
              [=](ProductCase& c) { c.outputs = outputs, c.rows = 20; });
  }
  for (const Storage& storage : Storages()) {
    const std::string& name = storage.name;
    for (int64_t rows : {1, 5, 17}) {
      const std::string suffix = "_rows_" + std::to_string(rows);
      table.Add(name + suffix, [=](ProductCase& c) { c.storage = storage, c.rows = rows, c.inputs = 192; });
      // Shorter than a group, a group and a bit, one that ends in the middle of its second half.
      for (int64_t inputs : {1, 27, 33, 64, 85, 127}) {
        table.Add(name + suffix + "_inputs_" + std::to_string(inputs),
                  [=](ProductCase& c) { c.storage = storage, c.rows = rows, c.inputs = inputs; });
      }
    }
  }
  for (const Storage& storage : Storages()) {
    for (int64_t rows : {1, 3, 6, 17, 34}) {
      const std::string name = absl::StrCat(storage.name, "_sparse_rows_", rows);
      const auto add = [&](absl::string_view suffix, float zeros, int64_t inputs, int64_t outputs) {
        table.Add(absl::StrCat(name, suffix), [=](ProductCase& c) {
          c.storage = storage, c.rows = rows, c.inputs = inputs, c.outputs = outputs, c.zeros = zeros;
          c.bias = c.accumulate = outputs % 2 == 1;
        });
      };
      add("", 0.85f, 200, 131);
      if (storage.quantization != Quantization::kInt8) continue;  // Others need not lie otherwise for it.
      add("_dense", 0.01f, 320, 16);
      add("_nearly_all", 0.995f, 320, 47);
      add("_inputs_33", 0.5f, 33, 300);
      add("_inputs_1", 0.5f, 1, 129);
    }
  }
  for (const Storage& storage : BlockStorages()) {
    for (int64_t rows : {1, 5, 17}) {
      for (int64_t inputs : {32, 96, 160, 256, 768}) {  // Of the small blocks an odd number, too.
        if (inputs % BlockWeights(storage.blocks) != 0) continue;
        table.Add(storage.name + "_rows_" + std::to_string(rows) + "_inputs_" + std::to_string(inputs),
                  [=](ProductCase& c) { c.storage = storage, c.rows = rows, c.inputs = inputs; });
      }
    }
  }
  table.Add("sigmoid", [](ProductCase& c) { c.activation = Activation::kSigmoid; });
  table.Add("tanh", [](ProductCase& c) { c.activation = Activation::kTanh; });
  table.Add("squared_relu", [](ProductCase& c) { c.activation = Activation::kSquaredRelu; });
  table.Add("squared_relu_many_rows", [](ProductCase& c) { c.activation = Activation::kSquaredRelu, c.rows = 19; });
  table.Add("silu", [](ProductCase& c) { c.activation = Activation::kSilu; });
  table.Add("decay", [](ProductCase& c) { c.activation = Activation::kDecay; });
  table.Add("decay_biased_many_rows",
            [](ProductCase& c) { c.activation = Activation::kDecay, c.bias = true, c.rows = 19; });
  for (int64_t rows : {1, 5, 19}) {
    const std::string suffix = "_rows_" + std::to_string(rows);
    table.Add("bias" + suffix, [=](ProductCase& c) { c.bias = true, c.rows = rows; });
    table.Add("gate" + suffix, [=](ProductCase& c) { c.gate = true, c.rows = rows; });
    table.Add("gate_in_place" + suffix, [=](ProductCase& c) { c.gate = c.in_place = c.bias = true, c.rows = rows; });
    table.Add("gate_accumulate" + suffix, [=](ProductCase& c) { c.gate = c.accumulate = true, c.rows = rows; });
    table.Add("bias_outputs_67" + suffix, [=](ProductCase& c) { c.bias = true, c.outputs = 67, c.rows = rows; });
  }
  table.Add("accumulate", [](ProductCase& c) { c.accumulate = true; });
  table.Add("accumulate_one_row", [](ProductCase& c) { c.accumulate = true, c.rows = 1; });
  table.Add("accumulate_many_rows", [](ProductCase& c) { c.accumulate = true, c.rows = 19; });
  table.Add("accumulate_tanh", [](ProductCase& c) { c.accumulate = true, c.activation = Activation::kTanh; });
  // More outputs than the panel of widened weights holds, and not a whole number of panels.
  table.Add("several_panels", [](ProductCase& c) { c.inputs = 3000, c.outputs = 45, c.rows = 8; });
  // For tiles of 16 outputs and 16 rows: full and broken, few and many rows, steps of a panel's inputs, several panels.
  for (int64_t rows : {16, 17, 32, 34, 49}) {
    table.Add("tiles_rows_" + std::to_string(rows),
              [=](ProductCase& c) { c.rows = rows, c.inputs = 1100, c.outputs = 300, c.bias = true; });
  }
  table.Add("tiles_many_rows", [](ProductCase& c) { c.rows = 530, c.inputs = 70, c.outputs = 20; });
  // A tile's outputs far apart, whose sums are stored as runs: several parts, the last one short, and outputs that are
  // left over. More rows as tiles than the cache is to hold. int8 with minimums, which no tile has.
  for (const Storage& storage : Storages()) {
    if (storage.dtype != DType::kBFloat16 && storage.group != 64) continue;
    for (int64_t rows : {8, 17}) {
      table.Add(absl::StrCat(storage.name, "_far_outputs_rows_", rows), [=](ProductCase& c) {
        c.storage = storage, c.rows = rows, c.inputs = 70, c.outputs = 2101, c.bias = c.accumulate = c.gate = true;
      });
    }
    if (storage.quantization != Quantization::kInt8) continue;
    table.Add("rows_beyond_cache",
              [=](ProductCase& c) { c.storage = storage, c.rows = 100, c.inputs = 5000, c.outputs = 18; });
    table.Add("int8_group_64_minimums",
              [=](ProductCase& c) { c.storage = storage, c.storage.has_minimums = true, c.rows = 6, c.inputs = 192; });
  }
  // Sums that wait in memory for the next block of inputs, of a few tens of rows and of more.
  for (int64_t rows : {20, 70}) {
    table.Add(absl::StrCat("blocks_of_inputs_rows_", rows),
              [=](ProductCase& c) { c.rows = rows, c.inputs = 1700, c.outputs = 75, c.gate = c.accumulate = true; });
  }
  // One tile of outputs is more than the panel.
  table.Add("inputs_beyond_panel", [](ProductCase& c) { c.inputs = 17000, c.outputs = 5, c.rows = 7; });
  return table.Build(MakeProductCase);
}

RWKV_TEST_OPERATION(Products, Cases());

}  // namespace
}  // namespace rwkv::kernels::conformance
