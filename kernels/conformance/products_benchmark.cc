// Speed of a product on every device this machine opens, weights cold (more of them than the caches hold).
//   GB/s: weights read per second.   GFLOP/s: 2 * rows * outputs * inputs per second.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "benchmark/benchmark.h"
#include "kernels/api/op_table.h"
#include "kernels/api/products.h"
#include "kernels/base/matrix.h"
#include "kernels/base/weight.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"

namespace rwkv::kernels {
namespace {

constexpr int64_t kColdBytes =
    256 << 20;  // Weights cycled through, well beyond the third-level cache's share of one core.

void BenchmarkProduct(benchmark::State& state, const std::string& device, const conformance::Storage& storage,
                      int64_t rows, int64_t outputs, int64_t inputs) {
  std::vector<float> values(static_cast<size_t>(outputs * inputs));
  for (int64_t i = 0; i < outputs * inputs; ++i) values[i] = static_cast<float>(i % inputs % 13 - 6) / 64.0f;
  std::vector<conformance::StoredMatrix> weights = {{storage, outputs, inputs, values}};
  const int64_t matrix_bytes = SizeInBytes(weights[0].view());
  weights[0].widened = {};
  weights.resize(static_cast<size_t>(kColdBytes / matrix_bytes), weights[0]);
  conformance::DeviceMemory memory(conformance::OpenedDevice(device));
  std::vector<const Weight*> loaded;
  for (const conformance::StoredMatrix& weight : weights) loaded.push_back(memory.Load(weight.view()));
  std::vector<float> inputs_of_rows(static_cast<size_t>(rows * inputs));
  for (size_t i = 0; i < inputs_of_rows.size(); ++i) inputs_of_rows[i] = static_cast<float>(i % 7) / 8.0f - 0.375f;
  Product product;
  product.x = memory.Put(inputs_of_rows);
  product.y = memory.Zeros(rows * outputs);

  size_t matrix = 0;
  for (auto _ : state) {
    product.weight = loaded[matrix];
    absl::Status status = memory.device().ops().products({rows, &product, 1}, memory.stream());
    if (status.ok()) status = memory.stream().Synchronize();
    if (!status.ok()) return state.SkipWithError(std::string(status.message()).c_str());
    benchmark::ClobberMemory();
    matrix = (matrix + 1) % weights.size();
  }
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(matrix_bytes) * iterations * 1e-9, benchmark::Counter::kIsRate);
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * static_cast<double>(rows * outputs * inputs) * iterations, benchmark::Counter::kIsRate);
}

void RegisterAll() {
  struct Shape {
    int64_t outputs;
    int64_t inputs;
  };
  for (const std::string& device : conformance::Backends()) {
    if (device == "reference" || device == "protected") continue;  // Nobody asks.
    std::vector<conformance::Storage> storages = conformance::Storages();
    for (const conformance::Storage& blocks : conformance::BlockStorages()) storages.push_back(blocks);
    for (const conformance::Storage& storage : storages) {
      for (const Shape& shape : {Shape{768, 768}, Shape{3072, 768}, Shape{768, 3072}}) {
        if (storage.name != "bf16" && shape.outputs != shape.inputs) continue;
        for (int64_t rows : {1, 4, 32, 128}) {
          benchmark::RegisterBenchmark(absl::StrCat("products/", device, "/", storage.name, "/out:", shape.outputs,
                                                    "/in:", shape.inputs, "/rows:", rows)
                                           .c_str(),
                                       [=](benchmark::State& state) {
                                         BenchmarkProduct(state, device, storage, rows, shape.outputs, shape.inputs);
                                       })
              ->UseRealTime();
        }
      }
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  rwkv::kernels::RegisterAll();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
