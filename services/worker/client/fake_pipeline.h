// Streams, epochs and the order of commands in a FakePipeline.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/fake_records.h"
#include "services/worker/client/fake_stage.h"
#include "services/worker/client/fake_worker.h"
#include "services/worker/engine/own_steps.h"

namespace rwkv::worker {

// Everything behind one lock; no threads of its own: a command runs inside the call that makes it runnable.
class FakePipelineState {
 public:
  // One Execute stream, from Open() until its owner drops it.
  struct Stream {
    int stage = 0;
    bool over = false;
    absl::Status end;
    std::string router;
    std::string epoch;  // Empty until open.
    bool opened = false;
    std::deque<v1::ExecuteRequest> commands;
    std::deque<v1::ExecuteResponse> responses;
    std::deque<v1::ExecuteResponse> held_saves;
    uint64_t steps_done = 0;
    uint64_t commands_taken = 0;
  };

  explicit FakePipelineState(FakePipeline::Options options);

  std::string Address(int index) const;
  absl::StatusOr<v1::DescribeResponse> Describe(int index, const v1::DescribeRequest& request);
  std::string Driver(int index);
  FakePipeline::Stats stats();

  std::shared_ptr<Stream> Open(int stage);
  absl::Status Write(const std::shared_ptr<Stream>& stream, const v1::ExecuteRequest& request);
  absl::StatusOr<v1::ExecuteResponse> Read(const std::shared_ptr<Stream>& stream);
  void Cancel(const std::shared_ptr<Stream>& stream, const absl::Status& why);

  void Kill(int index);
  void Restart(int index);
  void BreakEpoch();
  void SetDraining(int index, bool draining);
  void SetFrozen(int index, bool frozen);
  // And runs what can run then.
  void Change(const std::function<void(FakeConditions&)>& change);
  void LoseSnapshot(const std::string& snapshot_id);

 private:
  struct Worker {
    bool dead = false;
    bool draining = false;
    bool frozen = false;
    std::map<std::string, std::pair<v1::RouterAnnouncement, absl::Time>> routers;
    std::shared_ptr<Stream> driver;
    FakeStage stage;
    FakeStage::Refusals refusals{};  // Of the running step, handed on.
  };

  absl::Status Refused(int index) const;
  bool IsLast(int index) const { return index + 1 == options_.stage_count; }
  bool IsInEpochOf(int index, const Stream& stream) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Clear(Worker& worker) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static void End(Stream& stream, const absl::Status& why);
  // Ends `stream` with `why`, and the streams of the same epoch on other stages with kUnavailable.
  void EndEpochOf(std::shared_ptr<Stream> stream, const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OpenEpoch(const std::shared_ptr<Stream>& stream, const v1::ExecuteRequest& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Runs whatever can run, stage by stage, until nothing can.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // False: nothing of this stage can run.
  bool RunOne(int index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsStepDue(int index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Run(int index, const v1::ExecuteRequest& command) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of sequences that decode by themselves; through all stages at once.
  bool RunOwnStep() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Without an id: an own one.
  void RunStep(int index, const v1::Step& step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CountStep(const v1::Step& step, int rows, int64_t refused) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SendStopped(const OwnSteps::Stopped& stopped) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const FakePipeline::Options options_;
  mutable absl::Mutex mu_;
  FakeConditions conditions_ ABSL_GUARDED_BY(mu_);
  FakeRecords records_ ABSL_GUARDED_BY(mu_);
  FakePipeline::Stats stats_ ABSL_GUARDED_BY(mu_);
  std::vector<Worker> workers_ ABSL_GUARDED_BY(mu_);
  OwnSteps own_steps_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::worker
