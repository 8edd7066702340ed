#include "services/worker/client/fake_model.h"

namespace rwkv::worker {
namespace {

uint64_t Mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t FakeModel::Fresh(absl::string_view initial_state) {
  uint64_t state = 0x9e3779b97f4a7c15;
  for (const unsigned char byte : initial_state) state = Mix(state + byte);
  return state;
}

uint64_t FakeModel::Feed(uint64_t state, uint32_t token_id) { return Mix(state ^ Mix(token_id)); }

uint64_t FakeModel::Feed(uint64_t state, absl::Span<const uint32_t> token_ids) {
  for (uint32_t id : token_ids) state = Feed(state, id);
  return state;
}

uint32_t FakeModel::Next(uint64_t state, uint64_t position, const v1::Sampling& sampling, uint32_t vocab_size,
                         absl::Span<const uint32_t> banned, uint64_t counted) {
  uint64_t hash = Mix(state);
  if (sampling.frequency_penalty() != 0) hash = Mix(hash ^ counted);
  if (sampling.temperature() > 0) hash = Mix(hash ^ Mix(sampling.seed() + 1) ^ Mix(position + 2));
  uint32_t id = static_cast<uint32_t>(hash % vocab_size);
  const auto is_banned = [&banned](uint32_t candidate) {
    for (size_t i = 0; i + 1 < banned.size(); i += 2) {
      if (candidate >= banned[i] && candidate < banned[i + 1]) return true;
    }
    return false;
  };
  for (uint32_t tried = 0; tried < vocab_size && is_banned(id); ++tried) id = (id + 1) % vocab_size;
  return id;
}

std::vector<uint32_t> FakeModel::Generate(absl::Span<const uint32_t> log, int count, const v1::Sampling& sampling,
                                          uint32_t vocab_size, absl::string_view initial_state) {
  uint64_t state = Feed(Fresh(initial_state), log);
  uint64_t counted = sampling.penalize_prompt() ? Feed(0, log) : 0;
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) {
    tokens.push_back(Next(state, log.size() + i, sampling, vocab_size, {}, counted));
    state = Feed(state, tokens.back());
    counted = Feed(counted, tokens.back());
  }
  return tokens;
}

std::vector<uint32_t> FakeModel::Greedy(absl::Span<const uint32_t> log, int count, uint32_t vocab_size,
                                        absl::string_view initial_state) {
  return Generate(log, count, v1::Sampling(), vocab_size, initial_state);
}

}  // namespace rwkv::worker
