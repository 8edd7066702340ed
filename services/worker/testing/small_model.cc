#include "services/worker/testing/small_model.h"

#include <algorithm>
#include <cstdlib>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {

using ::rwkv::checkpoint::ModelVersion;
using ::rwkv::testing::IsOk;

std::string TempPath(const std::string& name) { return absl::StrCat(std::getenv("TEST_TMPDIR"), "/", name); }

rwkv::testing::RandomModelOptions SmallModel(ModelVersion version) {
  rwkv::testing::RandomModelOptions options;
  options.version = version;
  options.layers = 4;
  options.width = 40;
  options.head_size = 20;
  options.ffn_width = 72;
  options.vocab_size = kSmallVocabulary;
  options.mix_rank = 3;
  options.decay_rank = 6;
  options.iclr_rank = 5;
  options.value_residual_rank = 3;
  options.gate_rank = 9;
  return options;
}

std::string WriteSmallModel(ModelVersion version) {
  const std::string path = TempPath(absl::StrCat("small-", checkpoint::Name(version), ".safetensors"));
  EXPECT_THAT(rwkv::testing::WriteRandomModel(SmallModel(version), path), IsOk());
  return path;
}

std::vector<uint32_t> SomeTokens(int count, uint32_t seed) {
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    tokens.push_back((seed >> 16) % kSmallVocabulary);
  }
  return tokens;
}

absl::Status StatusOf(const v1::EntryResult& result) { return common::FromStatusProto(result.status()); }

std::string FeedInChunks(EnginePipeline& pipeline, int slot, uint64_t sequence, uint64_t position,
                         const std::vector<uint32_t>& tokens, size_t chunk) {
  std::string logits;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const size_t end = std::min(begin + chunk, tokens.size());
    const absl::StatusOr<StepOutput> output =
        pipeline.Feed(slot, sequence, position + begin, {tokens.begin() + begin, tokens.begin() + end});
    EXPECT_THAT(output, IsOk());
    if (!output.ok()) return "";
    logits += LogitsOf(*output, sequence);
  }
  return logits;
}

}  // namespace rwkv::worker
