// Sequences that decode by themselves: what the worker feeds next without asking the router. Pure; GoOn in worker.proto
// says what it means.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "absl/types/optional.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::worker {

// Told of all that happens to slots, in the order in which it is enqueued. Not thread-safe.
class OwnSteps {
 public:
  using Stopped = std::vector<v1::SequenceStopped>;  // To be sent, after the result that was handed in.

  void OnAttach(const v1::AttachSequence& attach);
  void OnRelease(const v1::ReleaseSlot& release);
  // A step is enqueued, the router's or an own one, and its results are there.
  void OnStep(const v1::Step& step);
  Stopped OnResult(const v1::StepResult& result);
  Stopped OnGoOn(const v1::GoOn& go_on);

  // Some sequence may go on now.
  bool ready() const;
  // The next step, without an id: those that may go on, the longest waiting first, at most `max_entries` (>= 1) of
  // them, and no more than leave each of `stages` something to do.
  v1::Step Next(int max_entries, int stages = 1);

 private:
  struct Sequence {
    uint64_t id = 0;
    std::vector<uint32_t> stop_token_ids;  // Ascending, both.
    std::vector<uint32_t> pause_token_ids;
    uint64_t position = 0;  // As the last result said.
    uint64_t known = 0;     // The router has results up to here; of several stages it may have them before this one.
    uint64_t until = 0;
    absl::optional<uint32_t> token;  // Drawn last, and not fed.
    int in_flight = 0;               // Steps without results.
    bool paused = false;             // Until `known` reaches `position`.
    bool stopping = false;           // Says so as soon as nothing is in flight.
    uint64_t waits_since = 0;        // Of last_turn_.

    bool Goes() const { return position < until && !paused && (in_flight > 0 || token.has_value()); }
    bool MayGoOn() const { return in_flight == 0 && token.has_value() && position < until && !paused; }
  };

  // Null: the slot is not this sequence's.
  Sequence* Find(int slot, uint64_t sequence);
  static v1::SequenceStopped StoppedAt(int slot, const Sequence& sequence);

  std::map<int, Sequence> sequences_;  // By slot.
  uint64_t last_turn_ = 0;
};

}  // namespace rwkv::worker
