// A small random model, and what tests feed it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"

namespace rwkv::worker {

inline constexpr int kSmallVocabulary = 61;

// Four layers of width 40.
rwkv::testing::RandomModelOptions SmallModel(checkpoint::ModelVersion version = checkpoint::ModelVersion::k7);

// Its file, in the test's own folder.
std::string WriteSmallModel(checkpoint::ModelVersion version = checkpoint::ModelVersion::k7);

std::string TempPath(const std::string& name);

std::vector<uint32_t> SomeTokens(int count, uint32_t seed);

absl::Status StatusOf(const v1::EntryResult& result);

// Feeds `tokens` in chunks of `chunk` and returns the logits of all, as bytes.
std::string FeedInChunks(EnginePipeline& pipeline, int slot, uint64_t sequence, uint64_t position,
                         const std::vector<uint32_t>& tokens, size_t chunk);

}  // namespace rwkv::worker
