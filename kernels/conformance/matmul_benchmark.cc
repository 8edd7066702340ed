// Speed of the matrix product of every backend this machine runs, one thread, weights cold (more of them than the
// caches hold).
//   GB/s: weights read per second.   GFLOP/s: 2 * rows * outputs * inputs per second.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "benchmark/benchmark.h"
#include "kernels/api/matmul.h"
#include "kernels/api/op_table.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/host_device.h"
#include "kernels/base/matrix.h"
#include "kernels/conformance/conformance.h"

namespace rwkv::kernels {
namespace {

constexpr int64_t kColdBytes =
    256 << 20;  // Weights cycled through, well beyond the third-level cache's share of one core.

void BenchmarkMatmul(benchmark::State& state, const OpTable* table, const conformance::Storage& storage, int64_t rows,
                     int64_t outputs, int64_t inputs) {
  std::vector<float> values(static_cast<size_t>(outputs * inputs));
  for (int64_t i = 0; i < outputs * inputs; ++i) values[i] = static_cast<float>(i % inputs % 13 - 6) / 64.0f;
  std::vector<conformance::StoredMatrix> weights = {{storage, outputs, inputs, values}};
  const int64_t matrix_bytes = SizeInBytes(weights[0].view());
  weights[0].widened = {};
  weights.resize(static_cast<size_t>(kColdBytes / matrix_bytes), weights[0]);
  absl::StatusOr<AlignedBuffer<float>> x = AlignedBuffer<float>::Create(rows * inputs);
  absl::StatusOr<AlignedBuffer<float>> y = AlignedBuffer<float>::Create(rows * outputs);
  if (!x.ok() || !y.ok()) return state.SkipWithError("no memory");
  for (int64_t i = 0; i < x->size(); ++i) (*x)[i] = static_cast<float>(i % 7 - 3) / 8.0f;

  HostStream stream;
  size_t matrix = 0;
  for (auto _ : state) {
    MatmulArgs args;
    args.rows = rows;
    args.weight = weights[matrix].view();
    args.x = x->data();
    args.y = y->data();
    const absl::Status status = table->matmul(args, stream);
    if (!status.ok()) return state.SkipWithError(std::string(status.message()).c_str());
    benchmark::DoNotOptimize(y->data());
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
  for (const OpTable* table : conformance::Backends()) {
    if (table->name == "reference") continue;  // Minutes, and nobody asks.
    std::vector<conformance::Storage> storages = conformance::Storages();
    for (const conformance::Storage& blocks : conformance::BlockStorages()) storages.push_back(blocks);
    for (const conformance::Storage& storage : storages) {
      for (const Shape& shape : {Shape{768, 768}, Shape{3072, 768}, Shape{768, 3072}}) {
        if (storage.name != "bf16" && shape.outputs != shape.inputs) continue;
        for (int64_t rows : {1, 4, 32, 128}) {
          benchmark::RegisterBenchmark(absl::StrCat("matmul/", table->name, "/", storage.name, "/out:", shape.outputs,
                                                    "/in:", shape.inputs, "/rows:", rows)
                                           .c_str(),
                                       [=](benchmark::State& state) {
                                         BenchmarkMatmul(state, table, storage, rows, shape.outputs, shape.inputs);
                                       });
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
