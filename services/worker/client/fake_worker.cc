#include "services/worker/client/fake_worker.h"

#include <utility>

#include "absl/time/time.h"
#include "services/worker/client/fake_pipeline.h"
#include "services/worker/client/fake_stage.h"
#include "services/worker/client/listening_thread.h"

namespace rwkv::worker {
namespace {

class FakeStream final : public ExecuteStream {
 public:
  FakeStream(std::shared_ptr<FakePipelineState> state, int stage)
      : state_(std::move(state)), stream_(state_->Open(stage)) {}
  ~FakeStream() override {
    Cancel();
    listening_.Join();
  }
  absl::Status Write(const v1::ExecuteRequest& request) override { return state_->Write(stream_, request); }
  absl::StatusOr<v1::ExecuteResponse> Read() override { return state_->Read(stream_); }
  void Listen(Heard heard) override { listening_.Start(this, std::move(heard)); }
  void Cancel() override { state_->Cancel(stream_, absl::CancelledError("cancelled by the caller")); }

 private:
  const std::shared_ptr<FakePipelineState> state_;
  const std::shared_ptr<FakePipelineState::Stream> stream_;
  ListeningThread listening_;
};

class FakeWorkerClient final : public WorkerClient {
 public:
  FakeWorkerClient(std::shared_ptr<FakePipelineState> state, int stage) : state_(std::move(state)), stage_(stage) {}
  absl::StatusOr<v1::DescribeResponse> Describe(absl::Time deadline) override { return state_->Describe(stage_, {}); }
  void AskToDescribe(const v1::DescribeRequest& request, absl::Time deadline, Described done) override {
    done(state_->Describe(stage_, request));
  }
  std::unique_ptr<ExecuteStream> Execute() override { return std::make_unique<FakeStream>(state_, stage_); }
  std::string address() const override { return state_->Address(stage_); }

 private:
  const std::shared_ptr<FakePipelineState> state_;
  const int stage_;
};

}  // namespace

FakePipeline::FakePipeline(Options options) : state_(std::make_shared<FakePipelineState>(std::move(options))) {}
FakePipeline::~FakePipeline() { state_->BreakEpoch(); }

std::unique_ptr<WorkerClient> FakePipeline::Connect(int stage) {
  return std::make_unique<FakeWorkerClient>(state_, stage);
}
FakePipeline::Stats FakePipeline::stats() const { return state_->stats(); }
std::string FakePipeline::driver(int stage) const { return state_->Driver(stage); }

void FakePipeline::Kill(int stage) { state_->Kill(stage); }
void FakePipeline::Restart(int stage) { state_->Restart(stage); }
void FakePipeline::BreakEpoch() { state_->BreakEpoch(); }
void FakePipeline::SetDraining(int stage, bool draining) { state_->SetDraining(stage, draining); }
void FakePipeline::Freeze(int stage) { state_->SetFrozen(stage, true); }
void FakePipeline::Thaw(int stage) { state_->SetFrozen(stage, false); }
void FakePipeline::LoseSnapshot(const std::string& snapshot_id) { state_->LoseSnapshot(snapshot_id); }

void FakePipeline::SetInitialStates(std::vector<std::string> initial_states) {
  state_->Change([&](FakeConditions& now) { now.initial_states = std::move(initial_states); });
}
void FakePipeline::SetFingerprint(std::string fingerprint) {
  state_->Change([&](FakeConditions& now) { now.fingerprint = std::move(fingerprint); });
}
void FakePipeline::PauseSteps() {
  state_->Change([](FakeConditions& now) {
    now.steps_paused = true;
    now.allowed_steps = 0;
  });
}
void FakePipeline::ResumeSteps() {
  state_->Change([](FakeConditions& now) { now.steps_paused = false; });
}
void FakePipeline::AllowSteps(int count) {
  state_->Change([=](FakeConditions& now) { now.allowed_steps += count; });
}
void FakePipeline::FailAttaches(int count, absl::Status status) {
  state_->Change([&](FakeConditions& now) { now.attaches = {count, std::move(status)}; });
}
void FakePipeline::FailSaves(int count, absl::Status status) {
  state_->Change([&](FakeConditions& now) { now.saves = {count, std::move(status)}; });
}
void FakePipeline::FailEntries(int count, absl::Status status) {
  state_->Change([&](FakeConditions& now) { now.entries = {count, std::move(status)}; });
}
void FakePipeline::FailBeyond(uint64_t position, absl::Status status) {
  state_->Change([&](FakeConditions& now) {
    now.fail_beyond = position;
    now.fail_beyond_with = std::move(status);
  });
}
void FakePipeline::HoldAttaches(bool held) {
  state_->Change([=](FakeConditions& now) { now.attaches_held = held; });
}
void FakePipeline::HoldSaves(bool held) {
  state_->Change([=](FakeConditions& now) { now.saves_held = held; });
}

}  // namespace rwkv::worker
