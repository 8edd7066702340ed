// What a pipeline of workers does with its commands, without workers: slots with hashes for states (FakeModel).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/own_steps.h"
#include "tests/simulator/model_store.h"

namespace rwkv::simulator {

inline constexpr uint32_t kVocabulary = 1000;

// Kernels of another family draw other tokens.
v1::Sampling OfFamily(v1::Sampling sampling, int family);

// One epoch. Not thread-safe.
class ModelLane {
 public:
  struct Answer {
    int stage = 0;
    v1::ExecuteResponse response;
  };

  // Parts that are wrong on purpose: what a check is for has to be seen by it.
  struct Broken {
    bool keeps_foreign_states = false;  // A slot goes on whatever position it is asked for.
    bool clears_nothing = false;        // A fresh slot has the state of whoever had it before.
    bool saves_late = false;            // A snapshot has seen a token more than it says.
  };

  // `loses` is asked for each entry after which no token is drawn: true, and it is said to be computed, and is not.
  ModelLane(int stages, int slots, int family, ModelStore* store, Broken broken, std::function<bool()> loses)
      : stages_(stages), slots_(slots), family_(family), store_(store), broken_(broken), loses_(std::move(loses)) {}

  // Carries out a command; answers in their order.
  std::vector<Answer> Do(const v1::ExecuteRequest& request);
  // Sequences decode by themselves: of one stage.
  bool HasOwnStep() const { return own_steps_.ready(); }
  std::vector<Answer> DoOwnStep() { return DoStep(own_steps_.Next(kMaxRows)); }

 private:
  struct Slot {
    bool held = false;
    uint64_t sequence = 0;
    uint64_t position = 0;
    uint64_t state = 0;  // When it is not held: what was left behind.
    v1::Sampling sampling;
  };

  static constexpr int kMaxRows = 8;

  std::vector<Answer> DoStep(const v1::Step& step);
  static void AddStopped(const worker::OwnSteps::Stopped& stopped, std::vector<Answer>* answers);
  absl::Status Attach(const v1::AttachSequence& attach);
  v1::EntryResult Compute(const v1::StepEntry& entry);
  absl::Status Save(const v1::SaveSnapshot& save);
  absl::Status CheckSlot(int slot, uint64_t sequence, uint64_t position) const;

  const int stages_;
  std::vector<Slot> slots_;
  const int family_;
  ModelStore* const store_;
  const Broken broken_;
  const std::function<bool()> loses_;
  worker::OwnSteps own_steps_;
};

}  // namespace rwkv::simulator
