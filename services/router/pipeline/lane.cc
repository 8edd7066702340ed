#include "services/router/pipeline/lane.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "services/common/logging.h"

namespace rwkv::router {

Lane::Lane(const Options& options, uint64_t epoch, StagePlan plan,
           std::vector<std::shared_ptr<worker::WorkerClient>> stages, LaneListener* listener,
           std::function<void()> changed)
    : options_(options),
      epoch_(epoch),
      plan_(std::move(plan)),
      listener_(listener),
      changed_(std::move(changed)),
      stages_(stages.size()) {
  for (size_t stage = 0; stage < stages.size(); ++stage) stages_[stage].worker = std::move(stages[stage]);
}

Lane::~Lane() {
  End(absl::CancelledError("the router stops"));
  if (thread_.joinable()) thread_.join();
}

void Lane::Start() {
  thread_ = std::thread([this] { Run(); });
}

std::string Lane::name() const { return absl::StrCat(options_.router, "/", options_.incarnation, "/", epoch_); }

void Lane::OpenStage(int stage) {
  const int stage_count = static_cast<int>(stages_.size());
  Stage& one = stages_[stage];
  one.stream = one.worker->Execute();
  one.commands = std::make_unique<CommandQueue>(options_.max_queued_commands);
  auto request = std::make_shared<v1::ExecuteRequest>();
  v1::OpenEpoch& open = *request->mutable_open();
  open.set_router(options_.router);
  open.set_epoch(name());
  open.set_stage_index(stage);
  open.set_stage_count(stage_count);
  if (stage + 1 < stage_count) open.set_next_address(plan_.stages[stage + 1].address);
  open.set_state_store_address(options_.state_store_address);
  one.commands->TryPush(std::move(request));
  worker::ExecuteStream* const stream = one.stream.get();
  CommandQueue* const commands = one.commands.get();
  one.label = absl::StrCat("worker ", plan_.stages[stage].address, " (stage ", stage, ")");
  stream->Listen([this, stage](absl::StatusOr<v1::ExecuteResponse> response) { Hear(stage, std::move(response)); });
  one.writer = std::thread([stream, commands] {
    std::shared_ptr<const v1::ExecuteRequest> command;
    // A failed write ends the stream; who listens hears why.
    while (commands->Pop(&command, absl::InfiniteFuture()) && stream->Write(*command).ok()) command = nullptr;
  });
}

void Lane::Run() {
  const int stage_count = static_cast<int>(stages_.size());
  const absl::Time open_deadline = absl::Now() + options_.open_timeout;
  for (int ready = 0; ready < stage_count; ++ready) {
    OpenStage(stage_count - 1 - ready);
    absl::MutexLock lock(&mu_);
    const auto opened_or_ending = [this, ready]()
                                      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return opened_ > ready || IsEnding(); };
    if (!mu_.AwaitWithDeadline(absl::Condition(&opened_or_ending), open_deadline)) {
      end_ = absl::UnavailableError(absl::StrCat("the epoch did not open within ",
                                                 absl::FormatDuration(options_.open_timeout), ": ", opened_, " of ",
                                                 stage_count, " stages are ready"));
    }
    if (IsEnding()) break;
  }
  bool up = false;
  {
    absl::MutexLock lock(&mu_);
    up = !IsEnding();
  }
  if (up) {
    common::LogInfo("pipeline_up", {{"epoch", epoch_},
                                    {"stages", stage_count},
                                    {"model", plan_.model.name()},
                                    {"slots", plan_.slots},
                                    {"max_batch_rows", plan_.max_batch_rows}});
    {
      absl::MutexLock lock(&mu_);
      phase_ = Phase::kUp;
      was_up_ = true;
    }
    listener_->OnEpochUp(epoch_, plan_);
    changed_();
  }
  absl::Status why;
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Lane::IsEnding));
    why = end_;
  }
  for (Stage& stage : stages_) {
    if (stage.stream == nullptr) continue;
    stage.stream->Cancel();
    stage.commands->Close();
  }
  for (Stage& stage : stages_) {
    if (stage.stream == nullptr) continue;
    stage.writer.join();
    stage.stream = nullptr;  // Nothing more is heard.
  }
  if (up) {
    common::LogWarning("epoch_ended", {{"epoch", epoch_}, {"status", why}});
    listener_->OnEpochDown(epoch_, why);
  }
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kOver;
  }
  changed_();
}

void Lane::Hear(int stage, absl::StatusOr<v1::ExecuteResponse> response) {
  Stage& one = stages_[stage];
  if (one.over) return;
  const auto end = [&](absl::StatusCode code, absl::string_view why) {
    one.over = true;
    End(absl::Status(code, absl::StrCat(one.label, why)));
  };
  if (!response.ok()) return end(response.status().code(), absl::StrCat(": ", response.status().message()));
  if (response->has_opened()) {
    if (std::exchange(one.opened, true)) return;
    absl::MutexLock lock(&mu_);
    ++opened_;
    return;
  }
  if (!one.opened) return end(absl::StatusCode::kInternal, " answered before it had opened the epoch");
  listener_->OnResponse(epoch_, stage, *std::move(response));
}

bool Lane::Send(const std::shared_ptr<const v1::ExecuteRequest>& command) {
  absl::MutexLock lock(&mu_);
  if (phase_ != Phase::kUp || IsEnding()) return false;
  for (size_t stage = 0; stage < stages_.size(); ++stage) {
    if (stages_[stage].commands->TryPush(command)) continue;
    end_ = absl::UnavailableError(
        absl::StrCat("stage ", stage, " does not take its commands: ", options_.max_queued_commands, " of them wait"));
    return false;
  }
  return true;
}

void Lane::End(absl::Status why) {
  absl::MutexLock lock(&mu_);
  if (end_.ok()) end_ = std::move(why);
}

Lane::Phase Lane::phase() const {
  absl::MutexLock lock(&mu_);
  return phase_;
}

bool Lane::was_up() const {
  absl::MutexLock lock(&mu_);
  return was_up_;
}

absl::Status Lane::why() const {
  absl::MutexLock lock(&mu_);
  return end_;
}

}  // namespace rwkv::router
