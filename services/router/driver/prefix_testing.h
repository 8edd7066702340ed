// Turns whose inputs begin alike, for tests.
#pragma once

#include <cstdint>
#include <vector>

#include "rwkv/v1/generation.pb.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"

namespace rwkv::router {

inline constexpr uint64_t kSystem = 200;  // Tokens that inputs here begin with.

inline TurnManager::Options Caching() {
  TurnManager::Options options;
  options.prefix_cache.enabled = true;
  options.prefix_cache.min_tokens = 50;
  options.prefix_cache.chunk_tokens = 100;
  return options;
}

// An input that begins with the shared part, and its own.
inline std::vector<uint32_t> Input(uint32_t own, int count = 10) {
  return Concat(Prompt(1, kSystem), Prompt(own, count));
}

inline v1::GenerateRequest Marked(uint32_t own, uint32_t count = 5) {
  v1::GenerateRequest request = Request(Input(own), count);
  request.add_prefix_ends(kSystem);
  return request;
}

// Until all that was begun is in the cache.
inline bool Kept(FakeCluster& cluster, double count) {
  return WaitUntil([&] { return cluster.metrics().prefixes_kept.Value() >= count; });
}

}  // namespace rwkv::router
