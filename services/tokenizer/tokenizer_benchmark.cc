// Bytes of text per second, there and back.
// Usage: tokenizer_benchmark WORLD_VOCABULARY 20B_TOKENIZER [TEXT...] [benchmark flags]
// Without a TEXT file: a made-up mixture.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "benchmark/benchmark.h"
#include "services/tokenizer/open_tokenizer.h"
#include "services/tokenizer/tokenizer.h"

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

void Encode(benchmark::State& state, const Tokenizer& tokenizer, const std::string& text) {
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Encode(text));
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
}

void Decode(benchmark::State& state, const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<uint32_t> ids = tokenizer.Encode(text);
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Decode(ids));
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * text.size()));
}

void Load(benchmark::State& state, const std::string& path) {
  for (auto _ : state) benchmark::DoNotOptimize(OpenTokenizer(path));
}

int Run(int argc, char** argv) {
  constexpr int kTokenizers = 2;
  if (argc < 1 + kTokenizers) {
    std::fprintf(stderr, "usage: tokenizer_benchmark WORLD_VOCABULARY 20B_TOKENIZER [TEXT...] [benchmark flags]\n");
    return 2;
  }
  std::vector<std::pair<std::string, std::string>> texts;
  for (int i = 1 + kTokenizers; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "cannot open %s\n", argv[i]);
      return 1;
    }
    texts.emplace_back(argv[i], std::string(std::istreambuf_iterator<char>(file), {}));
  }
  if (texts.empty()) texts.emplace_back("mixed", MixedText());
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  for (int i = 1; i <= kTokenizers; ++i) {
    const std::string path = argv[i];
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = OpenTokenizer(path);
    if (!tokenizer.ok()) {
      std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
      return 1;
    }
    tokenizers.push_back(*std::move(tokenizer));
    const Tokenizer& used = *tokenizers.back();
    const std::string name(used.name());
    for (const auto& [title, text] : texts) {
      benchmark::RegisterBenchmark(absl::StrCat("Encode/", name, "/", title).c_str(),
                                   [&used, &text = text](benchmark::State& state) { Encode(state, used, text); });
      benchmark::RegisterBenchmark(absl::StrCat("Decode/", name, "/", title).c_str(),
                                   [&used, &text = text](benchmark::State& state) { Decode(state, used, text); });
    }
    benchmark::RegisterBenchmark(absl::StrCat("Load/", name).c_str(),
                                 [path](benchmark::State& state) { Load(state, path); });
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace rwkv::tokenizer

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  return rwkv::tokenizer::Run(argc, argv);
}
