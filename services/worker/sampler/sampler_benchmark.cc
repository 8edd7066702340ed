// What one row costs at V = 65,536, on logits spread like a trained model's (sigma 2.5, a few likely ones on top).
#include <cstdint>
#include <random>
#include <vector>

#include "benchmark/benchmark.h"
#include "rwkv/v1/common.pb.h"
#include "services/worker/sampler/sampler.h"

namespace rwkv::worker {
namespace {

std::vector<float> ModelLikeLogits() {
  constexpr size_t kVocabSize = 65536;
  std::mt19937 random(3);
  std::normal_distribution<float> normal(-4, 2.5f);
  std::vector<float> logits(kVocabSize);
  for (float& logit : logits) logit = normal(random);
  for (int i = 0; i < 20; ++i) logits[random() % kVocabSize] = 10 - 0.5f * static_cast<float>(i);
  return logits;
}

void Run(benchmark::State& state, const v1::Sampling& sampling, const std::vector<float>& logits) {
  const absl::StatusOr<SamplingParams> params = SamplingParams::Create(sampling, static_cast<int64_t>(logits.size()));
  Sampler sampler;
  PenaltyState penalties;
  uint64_t position = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(sampler.Sample(logits, *params, position++, penalties));
  }
}

void Greedy(benchmark::State& state) { Run(state, v1::Sampling(), ModelLikeLogits()); }

void TopP(benchmark::State& state) {
  v1::Sampling sampling;
  sampling.set_temperature(1);
  sampling.set_top_p(0.9f);
  Run(state, sampling, ModelLikeLogits());
}

void TopPOfAFlatRow(benchmark::State& state) {
  v1::Sampling sampling;
  sampling.set_temperature(1);
  sampling.set_top_p(0.9f);
  std::vector<float> logits = ModelLikeLogits();
  for (float& logit : logits) logit *= 0.1f;
  Run(state, sampling, logits);
}

void TopK(benchmark::State& state) {
  v1::Sampling sampling;
  sampling.set_temperature(0.8f);
  sampling.set_top_k(50);
  Run(state, sampling, ModelLikeLogits());
}

void EveryCutAndTopLogprobs(benchmark::State& state) {
  v1::Sampling sampling;
  sampling.set_temperature(1.2f);
  sampling.set_top_k(1000);
  sampling.set_typical_p(0.95f);
  sampling.set_top_p(0.9f);
  sampling.set_min_p(0.01f);
  sampling.set_presence_penalty(0.5f);
  sampling.set_top_logprobs(20);
  Run(state, sampling, ModelLikeLogits());
}

BENCHMARK(Greedy);
BENCHMARK(TopP);
BENCHMARK(TopPOfAFlatRow);
BENCHMARK(TopK);
BENCHMARK(EveryCutAndTopLogprobs);

}  // namespace
}  // namespace rwkv::worker

BENCHMARK_MAIN();
