#include "services/router/pipeline/pipeline.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::router {
namespace {

// An epoch that lasted this long was a good one: the next attempt starts with the shortest pause again.
constexpr absl::Duration kStableEpoch = absl::Seconds(5);

}  // namespace

Pipeline::Pipeline(Options options, std::vector<std::unique_ptr<worker::WorkerClient>> workers, Listener* listener)
    : options_(std::move(options)), workers_(std::move(workers)), listener_(listener) {
  state_.status = absl::UnavailableError("the pipeline is connecting");
  state_.text = "connecting";
  for (const auto& worker : workers_) {
    WorkerStatus& known = known_.emplace_back();
    known.address = worker->address();
    known.status = absl::UnavailableError("not asked yet");
  }
}

Pipeline::~Pipeline() { Stop(); }

void Pipeline::Start() {
  thread_ = std::thread([this] { Run(); });
}

void Pipeline::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    for (StageStream& stage : streams_) stage.stream->Cancel();
  }
  if (thread_.joinable()) thread_.join();
}

void Pipeline::Run() {
  absl::Duration backoff = options_.min_backoff;
  while (true) {
    uint64_t epoch = 0;
    {
      absl::MutexLock lock(&mu_);
      if (stopping_) break;
      epoch = ++epoch_;
      end_ = absl::OkStatus();
      opened_ = 0;
    }
    const absl::Time begin = absl::Now();
    const absl::StatusOr<StagePlan> plan = Connect();
    const absl::Status why = plan.ok() ? RunEpoch(epoch, *plan) : plan.status();
    if (absl::Now() - begin > kStableEpoch) backoff = options_.min_backoff;

    absl::MutexLock lock(&mu_);
    if (stopping_) break;
    State state;
    state.status = common::Annotate(why, "no pipeline serves just now");
    state.text = absl::StrCat("connecting: ", why.message());
    state.model = state_.model;
    const bool changed = state.text != state_.text;
    state_ = std::move(state);
    if (changed) common::LogWarning("pipeline_down", {{"epoch", epoch}, {"status", why}});
    mu_.AwaitWithTimeout(absl::Condition(&stopping_), backoff);
    backoff = std::min(backoff * 2, options_.max_backoff);
  }
  absl::MutexLock lock(&mu_);
  state_.serving = false;
  state_.status = absl::UnavailableError("the router stops");
  state_.text = "stopped";
}

std::vector<absl::StatusOr<v1::DescribeResponse>> Pipeline::DescribeAll(absl::Time deadline) {
  std::vector<absl::StatusOr<v1::DescribeResponse>> answers(workers_.size(), absl::UnknownError("not asked"));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < workers_.size(); ++i) {
    threads.emplace_back([this, i, deadline, &answers] { answers[i] = workers_[i]->Describe(deadline); });
  }
  for (std::thread& thread : threads) thread.join();
  return answers;
}

absl::StatusOr<StagePlan> Pipeline::Connect() {
  const std::vector<absl::StatusOr<v1::DescribeResponse>> answers =
      DescribeAll(absl::Now() + options_.describe_timeout);
  std::vector<std::pair<std::string, v1::DescribeResponse>> described;
  absl::Status first_error;
  {
    absl::MutexLock lock(&mu_);
    for (size_t i = 0; i < workers_.size(); ++i) {
      known_[i].status = answers[i].status();
      if (answers[i].ok()) {
        known_[i].worker = *answers[i];
        described.emplace_back(workers_[i]->address(), *answers[i]);
        continue;
      }
      if (first_error.ok()) first_error = answers[i].status();
    }
  }
  if (!first_error.ok()) return absl::UnavailableError(first_error.message());
  RWKV_ASSIGN_OR_RETURN(StagePlan plan, MakeStagePlan(described));
  absl::MutexLock lock(&mu_);
  for (int stage = 0; stage < plan.stages.size(); ++stage) {
    known_[plan.stages[stage].worker_index].stage_index = stage;
    known_[plan.stages[stage].worker_index].stage_count = static_cast<int>(plan.stages.size());
  }
  return plan;
}

absl::Status Pipeline::RunEpoch(uint64_t epoch, const StagePlan& plan) {
  const int stages = static_cast<int>(plan.stages.size());
  const absl::Time open_deadline = absl::Now() + options_.open_timeout;
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return absl::CancelledError("the router stops");
    streams_.resize(stages);
    for (int stage = 0; stage < stages; ++stage) {
      StageStream& one = streams_[stage];
      one.stream = workers_[plan.stages[stage].worker_index]->Execute();
      one.commands = std::make_unique<CommandQueue>(options_.max_queued_commands);
      auto open = std::make_shared<v1::ExecuteRequest>();
      open->mutable_open()->set_router(options_.router);
      open->mutable_open()->set_epoch(absl::StrCat(options_.router, "/", options_.incarnation, "/", epoch));
      open->mutable_open()->set_stage_index(stage);
      open->mutable_open()->set_stage_count(stages);
      if (stage + 1 < stages) open->mutable_open()->set_next_address(plan.stages[stage + 1].address);
      open->mutable_open()->set_state_store_address(options_.state_store_address);
      one.commands->TryPush(std::move(open));
    }
    for (int stage = 0; stage < stages; ++stage) {
      StageStream& one = streams_[stage];
      worker::ExecuteStream* const stream = one.stream.get();
      CommandQueue* const commands = one.commands.get();
      const std::string label = absl::StrCat("worker ", plan.stages[stage].address, " (stage ", stage, ")");
      one.reader = std::thread([this, epoch, stage, label, stream] { ReadStage(epoch, stage, label, stream); });
      one.writer = std::thread([stream, commands] {
        std::shared_ptr<const v1::ExecuteRequest> command;
        // A failed write ends the stream; the reader says why.
        while (commands->Pop(&command, absl::InfiniteFuture()) && stream->Write(*command).ok()) command = nullptr;
      });
    }
  }

  bool up = false;
  absl::Status why;
  {
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithDeadline(absl::Condition(this, &Pipeline::OpenedOrOver), open_deadline)) {
      end_ = absl::UnavailableError(absl::StrCat("the epoch did not open within ",
                                                 absl::FormatDuration(options_.open_timeout), ": ", opened_, " of ",
                                                 stages, " stages are ready"));
    }
    up = end_.ok() && !stopping_;
  }
  if (up) {
    common::LogInfo("pipeline_up", {{"epoch", epoch},
                                    {"stages", stages},
                                    {"model", plan.model.name()},
                                    {"slots", plan.slots},
                                    {"max_batch_rows", plan.max_batch_rows}});
    listener_->OnEpochUp(epoch, plan);
    // Only now: who sees "serving" finds a listener that knows of it.
    absl::MutexLock lock(&mu_);
    state_.serving = true;
    state_.status = absl::OkStatus();
    state_.text = "serving";
    state_.model = plan.model;
  }

  std::vector<StageStream> streams;
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Pipeline::EpochOverOrStopping));
    why = end_.ok() ? absl::CancelledError("the router stops") : end_;
    end_ = why;
    state_.serving = false;
    state_.status = absl::UnavailableError(absl::StrCat("no pipeline serves just now: ", why.message()));
    state_.text = absl::StrCat("connecting: ", why.message());
    streams = std::move(streams_);
    streams_.clear();
  }
  for (StageStream& stage : streams) {
    stage.stream->Cancel();
    stage.commands->Close();
  }
  for (StageStream& stage : streams) {
    stage.reader.join();
    stage.writer.join();
  }
  if (up) {
    common::LogWarning("epoch_ended", {{"epoch", epoch}, {"status", why}});
    listener_->OnEpochDown(epoch, why);
  }
  return why;
}

void Pipeline::ReadStage(uint64_t epoch, int stage, const std::string& label, worker::ExecuteStream* stream) {
  bool opened = false;
  while (true) {
    absl::StatusOr<v1::ExecuteResponse> response = stream->Read();
    if (!response.ok()) {
      EndEpoch(epoch, absl::Status(response.status().code(), absl::StrCat(label, ": ", response.status().message())));
      return;
    }
    if (response->has_opened()) {
      absl::MutexLock lock(&mu_);
      if (!opened && epoch == epoch_) ++opened_;
      opened = true;
      continue;
    }
    if (!opened) {
      EndEpoch(epoch, absl::InternalError(absl::StrCat(label, " answered before it had opened the epoch")));
      return;
    }
    listener_->OnResponse(epoch, stage, *std::move(response));
  }
}

bool Pipeline::Send(uint64_t epoch, std::shared_ptr<const v1::ExecuteRequest> command) {
  absl::MutexLock lock(&mu_);
  if (epoch != epoch_ || !end_.ok() || stopping_ || streams_.empty()) return false;
  for (size_t stage = 0; stage < streams_.size(); ++stage) {
    if (streams_[stage].commands->TryPush(command)) continue;
    end_ = absl::UnavailableError(
        absl::StrCat("stage ", stage, " does not take its commands: ", options_.max_queued_commands, " of them wait"));
    return false;
  }
  return true;
}

void Pipeline::EndEpoch(uint64_t epoch, absl::Status why) {
  absl::MutexLock lock(&mu_);
  if (epoch == epoch_ && end_.ok()) end_ = std::move(why);
}

Pipeline::State Pipeline::state() const {
  absl::MutexLock lock(&mu_);
  return state_;
}

std::vector<Pipeline::WorkerStatus> Pipeline::Probe(absl::Time deadline) {
  const std::vector<absl::StatusOr<v1::DescribeResponse>> answers = DescribeAll(deadline);
  absl::MutexLock lock(&mu_);
  std::vector<WorkerStatus> workers = known_;
  for (size_t i = 0; i < workers.size(); ++i) {
    workers[i].status = answers[i].status();
    if (answers[i].ok()) workers[i].worker = *answers[i];
  }
  return workers;
}

}  // namespace rwkv::router
