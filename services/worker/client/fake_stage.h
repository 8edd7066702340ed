// What one stage of a FakePipeline makes of a command: its slots, and nothing of streams, epochs or order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/fake_model.h"
#include "services/worker/client/fake_records.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::worker {

// The next `count` of something fail.
struct FakeFailures {
  int count = 0;
  absl::Status status;
  bool Take() { return count > 0 && count-- > 0; }
};

// What a test changes while a pipeline runs.
struct FakeConditions {
  std::vector<std::string> initial_states;
  std::string fingerprint;
  FakeFailures attaches, saves, entries;
  uint64_t fail_beyond = 0;
  absl::Status fail_beyond_with;
  bool attaches_held = false;
  bool saves_held = false;
  bool steps_paused = false;
  int allowed_steps = 0;  // While paused.
};

// Under its pipeline's lock.
class FakeStage {
 public:
  // Statuses by entry of a step.
  using Refusals = absl::flat_hash_map<int, absl::Status>;

  // All outlive it.
  FakeStage(int index, const FakePipeline::Options* options, FakeConditions* conditions, FakeRecords* records,
            FakePipeline::Stats* stats)
      : index_(index), options_(*options), conditions_(*conditions), records_(*records), stats_(*stats) {
    Clear();
  }

  int first_layer() const { return options_.layers * index_ / options_.stage_count; }
  int end_layer() const { return options_.layers * (index_ + 1) / options_.stage_count; }
  bool is_last() const { return index_ + 1 == options_.stage_count; }
  int slots_used() const;

  void Clear() { slots_.assign(options_.slots, Slot()); }
  absl::Status Attach(const v1::AttachSequence& attach);
  // `refusals`: of the stages before; gets this one's, too. The last stage answers what is asked, with rows of logits
  // in `logits`.
  v1::StepResult Step(const v1::Step& step, Refusals& refusals, std::vector<v1::LogitsRows>& logits);
  v1::SnapshotSaved Save(const v1::SaveSnapshot& save);
  void Release(const v1::ReleaseSlot& release);

 private:
  struct Slot {
    bool held = false;
    uint64_t sequence = 0;
    uint64_t position = 0;
    uint64_t state = FakeModel::Fresh();
    v1::Sampling sampling;
    std::vector<uint32_t> banned;
    uint64_t counted = 0;  // Feed() of the tokens that the penalties count.
  };

  absl::Status Check(int slot, uint64_t sequence, uint64_t position) const;
  absl::Status Load(const v1::AttachSequence& attach, uint64_t& state) const;
  absl::Status Feed(const v1::StepEntry& entry);
  void Answer(const v1::StepEntry& entry, uint64_t step_id, v1::EntryResult& out, std::vector<v1::LogitsRows>& logits);
  v1::LogitsRows LogitsOf(const v1::StepEntry& entry, uint64_t step_id) const;

  const int index_;
  const FakePipeline::Options& options_;
  FakeConditions& conditions_;
  FakeRecords& records_;
  FakePipeline::Stats& stats_;
  std::vector<Slot> slots_;
};

v1::StatusProto ToProto(const absl::Status& status);

}  // namespace rwkv::worker
