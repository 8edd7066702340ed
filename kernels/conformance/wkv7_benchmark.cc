// Speed of RWKV-7's core on every device this machine opens, states cold where there are many (one pool for each of the
// layers of a 0.1B model, taken in turns).
//   head_token: time for one head of one token.   GB/s: states read and written per second.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "benchmark/benchmark.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/step_rows.h"
#include "kernels/api/wkv7.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"

namespace rwkv::kernels {
namespace {

constexpr int64_t kLayers = 12;
constexpr int64_t kHeads = 12;
constexpr int64_t kHeadSize = 64;
constexpr int64_t kWidth = kHeads * kHeadSize;

void BenchmarkWkv7(benchmark::State& state, const std::string& device, int64_t sequences, int64_t tokens) {
  conformance::DeviceMemory memory(conformance::OpenedDevice(device));
  conformance::Random random(1);
  const int64_t rows = sequences * tokens;
  std::vector<SequenceSpan> spans;
  for (int64_t s = 0; s < sequences; ++s) spans.push_back({static_cast<int32_t>(s), s * tokens, tokens});
  const std::vector<int32_t> ids(static_cast<size_t>(rows));
  const StepRows step = {rows, sequences, memory.Put(absl::MakeConstSpan(spans)), memory.Put(absl::MakeConstSpan(ids))};
  const float* const weights = memory.Put(random.Uniforms(kWidth, -0.5f, 0.5f));
  Wkv7Args args;
  args.step = &step;
  args.heads = kHeads;
  args.head_size = kHeadSize;
  args.decay_bias = args.iclr_bias = args.k_k = args.k_a = args.bonus = args.ln_weight = args.ln_bias =
      args.value_gate_bias = weights;
  const auto input = [&] { return memory.Put(random.Uniforms(rows * kWidth, -1.0f, 1.0f)); };
  args.r = input();
  args.k = input();
  args.v = input();
  args.g = input();
  args.decay_lora = input();
  args.iclr_lora = input();
  args.value_gate_lora = input();
  args.v_first = input();
  args.y = memory.Zeros(rows * kWidth);
  std::vector<float*> pools;
  for (int64_t layer = 0; layer < kLayers; ++layer) pools.push_back(memory.Zeros(sequences * kWidth * kHeadSize));

  int64_t layer = 0;
  for (auto _ : state) {
    args.state = {pools[layer], kWidth * kHeadSize};
    absl::Status status = memory.device().ops().wkv7(args, memory.stream());
    if (status.ok()) status = memory.stream().Synchronize();
    if (!status.ok()) return state.SkipWithError(std::string(status.message()).c_str());
    layer = (layer + 1) % kLayers;
  }
  const auto heads = static_cast<double>(state.iterations() * sequences * kHeads);
  state.counters["head_token"] = benchmark::Counter(heads * static_cast<double>(tokens),
                                                    benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.counters["GB/s"] =
      benchmark::Counter(heads * 2e-9 * kHeadSize * kHeadSize * sizeof(float), benchmark::Counter::kIsRate);
}

void RegisterAll() {
  for (const std::string& device : conformance::Backends()) {
    if (device == "reference" || device == "protected") continue;  // Nobody asks.
    for (int64_t sequences : {1, 8, 32}) {
      for (int64_t tokens : {1, 64}) {
        benchmark::RegisterBenchmark(
            absl::StrCat("wkv7/", device, "/sequences:", sequences, "/tokens:", tokens).c_str(),
            [=](benchmark::State& state) { BenchmarkWkv7(state, device, sequences, tokens); });
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
