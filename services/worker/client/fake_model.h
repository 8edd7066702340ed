// The made-up model of a FakePipeline. State = hash of all tokens so far; greedy next token = Next(all tokens so far),
// and with a temperature Next(all tokens, seed). With a frequency penalty it depends on the turn's own tokens, too. So
// the tokens of a turn are known in advance, however it was batched, chunked, saved, restored or recovered.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::worker {

struct FakeModel {
  // The state of a fresh sequence (of one that begins with a tuned state, unless empty), and after one more token.
  static uint64_t Fresh(absl::string_view initial_state = "");
  static uint64_t Feed(uint64_t state, uint32_t token_id);
  static uint64_t Feed(uint64_t state, absl::Span<const uint32_t> token_ids);

  // The token drawn after a state that has seen `position` tokens. Temperature 0: of the state alone; else also of
  // (seed, position); with a frequency penalty also of `counted`, the Feed() of the tokens that the penalties count.
  // Never in the `banned` [begin, end) pairs.
  static uint32_t Next(uint64_t state, uint64_t position, const v1::Sampling& sampling, uint32_t vocab_size,
                       absl::Span<const uint32_t> banned = {}, uint64_t counted = 0);

  // Tokens that a greedy turn of `count` tokens generates after `log`.
  static std::vector<uint32_t> Greedy(absl::Span<const uint32_t> log, int count, uint32_t vocab_size,
                                      absl::string_view initial_state = "");
  // The same with any sampling (temperature, seed, frequency penalty and penalize_prompt count).
  static std::vector<uint32_t> Generate(absl::Span<const uint32_t> log, int count, const v1::Sampling& sampling,
                                        uint32_t vocab_size, absl::string_view initial_state = "");
};

}  // namespace rwkv::worker
