// A pipeline of workers in memory with a made-up model, for tests of those who drive workers. It honours slots,
// positions, epochs, attach, save and release as worker.proto says, and runs a step on a stage only after the stage
// before it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/fake_model.h"  // IWYU pragma: export
#include "services/worker/client/worker_client.h"

namespace rwkv::worker {

class FakePipelineState;

// Thread-safe. Clients and streams may outlive it.
class FakePipeline {
 public:
  struct Options {
    int stage_count = 2;
    int layers = 4;  // >= stage_count, divided evenly.
    int slots = 8;
    int max_batch_tokens = 128;
    int vocab_size = 1000;
    std::string name = "fake";  // Of its workers: "fake-0", and "fake-0:1" is the address.
    std::string numeric_family;
    std::string model_name = "fake";
    std::string fingerprint = "00000000000000000000000000000fab";
    std::string tokenizer;  // "world" or empty.
    std::vector<std::string> initial_states;
    int64_t record_bytes = 8;         // Of a layer's state: the hash, the hash + 1, and so on; a multiple of 8.
    uint64_t max_context_tokens = 0;  // As DescribeResponse says it; entries beyond are refused. 0: no bound.
    // If set, records are written and read through these (a fake state store); else they are kept by the pipeline.
    // Called under the pipeline's lock: must not call it back.
    std::function<absl::Status(const v1::RecordInfo& info, const std::string& bytes)> put_record;
    std::function<absl::StatusOr<std::string>(const v1::RecordInfo& info)> get_record;
  };

  explicit FakePipeline(Options options);
  ~FakePipeline();
  FakePipeline(const FakePipeline&) = delete;
  FakePipeline& operator=(const FakePipeline&) = delete;

  // A connection to the worker of one stage, "fake-<stage>:1" unless it has another name.
  std::unique_ptr<WorkerClient> Connect(int stage);

  // The process dies: every stream of the epoch ends with kUnavailable and this worker refuses until Restart. Its slots
  // are lost.
  void Kill(int stage);
  void Restart(int stage);
  // The epoch ends as after a broken link; the workers stay up.
  void BreakEpoch();
  void SetDraining(int stage, bool draining);
  // The process is alive, but silent: streams take commands and say nothing, and nobody is told who it is.
  void Freeze(int stage);
  void Thaw(int stage);
  // As if every worker had been started with others; heard of with the next epoch.
  void SetInitialStates(std::vector<std::string> initial_states);
  void SetFingerprint(std::string fingerprint);

  // Steps are taken, but none is computed until Resume: the caller sees a slow pipeline.
  void PauseSteps();
  void ResumeSteps();
  // Let `count` more steps through while paused.
  void AllowSteps(int count);

  // The next `count` commands of the kind answer with `status` (on the last stage for steps' entries).
  void FailAttaches(int count, absl::Status status);
  void FailSaves(int count, absl::Status status);
  void FailEntries(int count, absl::Status status);
  // From now on whoever asks for what comes after more than `position` tokens gets `status`, as of a model whose logits
  // overflow. OkStatus ends it.
  void FailBeyond(uint64_t position, absl::Status status);
  // Attaches are taken and not answered, until false; what is behind them waits.
  void HoldAttaches(bool held);
  // Saves are not answered, until false. Nothing waits behind them, as with a worker whose store hangs.
  void HoldSaves(bool held);
  // Snapshots of this id can no longer be read (kDataLoss at attach).
  void LoseSnapshot(const std::string& snapshot_id);

  struct Stats {
    int64_t epochs = 0;           // Opened on every stage.
    int64_t steps = 0;            // Finished on the last stage, over all epochs.
    int64_t own_steps = 0;        // Of those: the worker's own.
    int64_t rows = 0;             // Of those.
    int64_t entries = 0;          // Of those.
    int64_t refused_entries = 0;  // Of those.
    int max_rows_in_step = 0;
    int max_entries_in_step = 0;
    int max_steps_in_flight = 0;  // Written to the first stage and not yet finished on the last.
    int slots_used = 0;           // Now, on the first stage.
    int64_t attaches_fresh = 0;   // Successful, counted on the last stage.
    int64_t attaches_tuned = 0;   // Of those: with a tuned state.
    int64_t attaches_warm = 0;
    int64_t attaches_snapshot = 0;
    int64_t attaches_kept = 0;  // Of those: with `keep`.
    int64_t saves = 0;
    int64_t saves_kept = 0;  // Of those: with `keep`.
    int64_t releases = 0;
  };
  Stats stats() const;
  // The router that drives a stage; empty: none.
  std::string driver(int stage) const;

 private:
  const std::shared_ptr<FakePipelineState> state_;
};

}  // namespace rwkv::worker
