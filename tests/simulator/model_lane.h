// What the workers of a pipeline do with their commands, without workers: stages with hashes for states (FakeModel).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/own_steps.h"
#include "tests/simulator/model_store.h"

namespace rwkv::simulator {

inline constexpr uint32_t kVocabulary = 1000;

// Kernels of another family draw other tokens.
v1::Sampling OfFamily(v1::Sampling sampling, int family);

// What kernels of a family say of a token after a state, and, of kVocabulary, of the state itself: a small whole
// number.
float ModelValue(uint64_t state, uint32_t token_id, int family);

// One epoch of a chain of workers. Not thread-safe.
class ModelLane {
 public:
  // Parts that are wrong on purpose: what a check is for has to be seen by it.
  struct Broken {
    bool keeps_foreign_states = false;  // A slot goes on whatever position it is asked for.
    bool clears_nothing = false;        // A fresh slot has the state of whoever had it before.
    bool saves_late = false;            // A snapshot has seen a token more than it says.
    bool stops_in_silence = false;      // A sequence that was told to stop does not say where.
    bool feeds_unasked = false;         // What was drawn comes back again, and is fed to whoever has the slot by then.
    bool answers_early = false;         // Scores, logits and hidden states are those before a token.
    bool checks_no_sums = false;        // A state is begun with whatever became of it in the store.
  };
  struct Options {
    int stages = 1;
    int slots = 1;
    int family = 0;
    Broken broken;
  };
  // States that a worker has in memory, by their snapshots; those of its processes, not of an epoch.
  using KeptStates = std::map<std::string, uint64_t>;
  // Where it stands.
  struct World {
    ModelStore* store = nullptr;
    std::function<void(absl::Duration, std::function<void()>)> after;  // Nothing, once the lane is over.
    std::function<absl::Duration()> draw_delay;  // From one process to the next; drawn once, so that order is kept.
    std::function<bool(int stage)> is_frozen;
    std::function<void(int stage, v1::ExecuteResponse)> answer;
    std::function<KeptStates*(int stage)> kept;
    // Asked for each entry after which no token is drawn: true, and it is said to be computed, and is not.
    std::function<bool()> loses;
  };

  ModelLane(const Options& options, World world);

  // A command leaves the router for all stages.
  void Send(const std::shared_ptr<const v1::ExecuteRequest>& command);
  // Some worker is not frozen any more.
  void Thawed();

 private:
  struct Slot {
    bool held = false;
    uint64_t sequence = 0;
    uint64_t position = 0;
    uint64_t state = 0;  // When it is not held: what was left behind.
    float hidden_sum = 0;
    v1::Sampling sampling;
  };
  // A step between stages.
  struct Frame {
    v1::Step step;
    bool is_own = false;
    uint64_t commands_before = 0;         // Of an own one.
    std::map<int, absl::Status> refused;  // By entry.
    std::vector<v1::LogitsRows> logits;   // Of the last stage.
  };
  struct Stage {
    absl::Duration from_router, to_router, to_next;
    std::vector<Slot> slots;
    std::deque<std::shared_ptr<const v1::ExecuteRequest>> commands;
    uint64_t commands_taken = 0;
    std::deque<Frame> frames;
    bool computes = false;
    std::deque<std::function<void()>> held;  // What it was about to do when it froze.
  };

  static constexpr int kMaxRows = 8;

  bool IsLast(int index) const { return index + 1 == options_.stages; }
  // Does it, or holds it until the stage is not frozen any more.
  void Do(int index, std::function<void()> work);
  void Answer(int index, v1::ExecuteResponse response);
  void SendStopped(const worker::OwnSteps::Stopped& stopped);
  void Run(int index);
  // Whatever is next: a step of the first stage's own, or a command whose turn it is. False: nothing is.
  bool RunOne(int index);
  void RunCommand(int index, const v1::ExecuteRequest& request);
  void BeginStep(int index, Frame frame);
  void FinishStep(int index, Frame frame, v1::StepResult result);
  void Drawn(v1::StepResult result);
  absl::Status Attach(int index, const v1::AttachSequence& attach);
  absl::StatusOr<uint64_t> Load(int index, const v1::AttachSequence& attach) const;
  void Keep(int index, const std::string& snapshot_id, uint64_t state) const;
  v1::EntryResult Compute(int index, const v1::StepEntry& entry, std::vector<v1::LogitsRows>* logits);
  // What the last stage says of the tokens of an entry as it feeds them.
  void FeedAndAnswer(const v1::StepEntry& entry, Slot& slot, v1::EntryResult* result,
                     std::vector<v1::LogitsRows>* logits) const;
  absl::Status Save(int index, const v1::SaveSnapshot& save);
  absl::Status CheckSlot(const Stage& stage, int slot, uint64_t sequence, uint64_t position) const;

  const Options options_;
  const World world_;
  std::vector<Stage> stages_;
  absl::Duration back_;  // From the last to the first.
  worker::OwnSteps own_steps_;
};

}  // namespace rwkv::simulator
