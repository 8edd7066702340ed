// Bytes of mixed text per second, there and back. Usage: tokenizer_benchmark VOCABULARY [benchmark flags]
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "benchmark/benchmark.h"
#include "services/tokenizer/world_tokenizer.h"

namespace rwkv::tokenizer {
namespace {

std::string MixedText() {
  std::string text;
  while (text.size() < 1 << 20) {
    text +=
        "The quick brown fox jumps over the lazy dog, and 12345.678 other things happen on 2026-11-22.\n"
        "在一个小房子里,河边的老人说:你好,世界!\n"
        "for (int i = 0; i < n; ++i) {\n        sum += values[i] * weights[i];  // accumulate\n    }\n\n";
  }
  return text;
}

void Encode(benchmark::State& state, const WorldTokenizer& tokenizer) {
  const std::string text = MixedText();
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Encode(text));
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
}

void Decode(benchmark::State& state, const WorldTokenizer& tokenizer) {
  const std::string text = MixedText();
  const std::vector<uint32_t> ids = tokenizer.Encode(text);
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Decode(ids));
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
}

void Load(benchmark::State& state, const std::string& path) {
  for (auto _ : state) benchmark::DoNotOptimize(WorldTokenizer::FromFile(path));
}

}  // namespace
}  // namespace rwkv::tokenizer

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const std::string path = argc > 1 ? argv[1] : "";
  const absl::StatusOr<std::unique_ptr<rwkv::tokenizer::WorldTokenizer>> tokenizer =
      rwkv::tokenizer::WorldTokenizer::FromFile(path);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
    return 1;
  }
  benchmark::RegisterBenchmark("Encode", [&](benchmark::State& state) { rwkv::tokenizer::Encode(state, **tokenizer); });
  benchmark::RegisterBenchmark("Decode", [&](benchmark::State& state) { rwkv::tokenizer::Decode(state, **tokenizer); });
  benchmark::RegisterBenchmark("Load", [&](benchmark::State& state) { rwkv::tokenizer::Load(state, path); });
  benchmark::RunSpecifiedBenchmarks();
}
