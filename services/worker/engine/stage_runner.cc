#include "services/worker/engine/stage_runner.h"

#include <cstdlib>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::worker {
namespace {

constexpr int kDeviceLostStatus = 70;  // EX_SOFTWARE

v1::ExecuteResponse Attached(int slot, uint64_t sequence, const absl::Status& status) {
  v1::ExecuteResponse response;
  response.mutable_attached()->set_slot(slot);
  response.mutable_attached()->set_sequence(sequence);
  *response.mutable_attached()->mutable_status() = common::ToStatusProto(status);
  return response;
}

v1::ExecuteResponse Saved(const std::string& snapshot_id, const absl::StatusOr<std::vector<v1::RecordInfo>>& records) {
  v1::ExecuteResponse response;
  response.mutable_saved()->set_snapshot_id(snapshot_id);
  *response.mutable_saved()->mutable_status() = common::ToStatusProto(records.status());
  if (records.ok()) {
    for (const v1::RecordInfo& record : *records) *response.mutable_saved()->add_records() = record;
  }
  return response;
}

}  // namespace

StageRunner::StageRunner(StageEngine* engine, LinkTransport* links, SnapshotTransfer* transfer, StoreFactory open_store,
                         WorkerMetrics* metrics, const RouterRegistry* routers, StageRunnerOptions options)
    : engine_(engine),
      links_(links),
      transfer_(transfer),
      open_store_(std::move(open_store)),
      metrics_(metrics),
      routers_(routers),
      options_(std::move(options)),
      kept_(std::make_shared<KeptStates>(options_.kept_state_bytes, metrics)),
      spans_(options_.tracer) {
  metrics_->slots.Set(engine_->options().slots);
  metrics_->state_bytes.Set(static_cast<double>(engine_->pool().bytes()));
  thread_ = std::thread([this] { Loop(); });
}

StageRunner::~StageRunner() {
  std::shared_ptr<Epoch> current, pending;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    current = current_;
    pending = std::exchange(pending_, nullptr);
  }
  const absl::Status why = absl::UnavailableError("the worker shuts down");
  if (current != nullptr) current->End(why);
  if (pending != nullptr) pending->End(why);
  thread_.join();
}

absl::Status StageRunner::CheckPlan(const v1::OpenEpoch& open) const {
  if (open.router().empty() || open.epoch().empty()) {
    return absl::InvalidArgumentError("open: router and epoch must be named");
  }
  const bool first = open.stage_index() == 0;
  const bool last = open.stage_index() + 1 == open.stage_count();
  const LayerRange layers = engine_->model().weights().layers();
  if (open.stage_index() < 0 || open.stage_index() >= open.stage_count() || first != engine_->is_first() ||
      last != engine_->is_last()) {
    return absl::FailedPreconditionError(absl::StrCat("stage ", open.stage_index(), " of ", open.stage_count(),
                                                      " does not fit layers ", layers.ToString(), " of ",
                                                      engine_->model().weights().config().layer_count));
  }
  if (last != open.next_address().empty()) {
    return absl::FailedPreconditionError(absl::StrCat("stage ", open.stage_index(), " of ", open.stage_count(),
                                                      " with next address '", open.next_address(), "'"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<Epoch>> StageRunner::Open(const v1::OpenEpoch& open, std::shared_ptr<EpochSink> sink) {
  if (absl::Status status = CheckPlan(open); !status.ok()) return status;
  std::vector<std::shared_ptr<Epoch>> old;
  std::shared_ptr<Epoch> epoch;
  {
    absl::MutexLock lock(&mu_);
    if (stopping_ || draining_) return absl::UnavailableError("the worker drains");
    for (const std::shared_ptr<Epoch>& other : {current_, pending_}) {
      if (other == nullptr || other->ended()) continue;
      const std::string& driver = other->open().router();
      if (driver != open.router() && !routers_->IsSilent(driver)) {
        return absl::UnavailableError(absl::StrCat("router ", driver, " drives this worker"));
      }
      if (other->open().epoch() == open.epoch()) {
        return absl::InvalidArgumentError(absl::StrCat("epoch ", open.epoch(), " is open already"));
      }
      old.push_back(other);
    }
    // From here on the stage before may connect, while the epoch before leaves the thread.
    epoch = std::make_shared<Epoch>(open, std::move(sink), engine_->is_first() ? nullptr : links_->Accept(open.epoch()),
                                    engine_->is_last() ? nullptr : links_->Dial(open.next_address(), open.epoch()),
                                    open.state_store_address().empty() ? nullptr : open_store_());
    pending_ = epoch;
  }
  if (epoch->receiver_ != nullptr) {
    epoch->receiver_->NotifyBroken([weak = std::weak_ptr<Epoch>(epoch)](const absl::Status& why) {
      if (const std::shared_ptr<Epoch> broken = weak.lock(); broken != nullptr) broken->End(why);
    });
    epoch->receiver_->NotifyFrames([weak = std::weak_ptr<Epoch>(epoch)](absl::optional<uint64_t> own_after) {
      if (const std::shared_ptr<Epoch> of_frame = weak.lock(); of_frame != nullptr) of_frame->PushFrame(own_after);
    });
  }
  if (epoch->sender_ != nullptr) {
    // Who is between the first stage and the last hands it on. The epoch outlives the sender's thread.
    epoch->sender_->NotifyDrawn([epoch = epoch.get()](v1::StepResult drawn) {
      if (epoch->receiver_ == nullptr) return epoch->PushDrawn(std::move(drawn));
      if (absl::Status status = epoch->receiver_->Return(drawn); !status.ok()) epoch->End(status);
    });
  }
  for (const std::shared_ptr<Epoch>& other : old) {
    other->End(absl::UnavailableError(absl::StrCat("epoch ", open.epoch(), " took over")));
  }
  return epoch;
}

StageRunner::Driver StageRunner::driver() const {
  absl::MutexLock lock(&mu_);
  for (const std::shared_ptr<Epoch>& epoch : {pending_, current_}) {
    if (epoch != nullptr && !epoch->ended()) return {epoch->open().router(), epoch->open().epoch()};
  }
  return {};
}

void StageRunner::Drain(absl::Time deadline) {
  std::shared_ptr<Epoch> current, pending;
  bool first = false;
  {
    absl::MutexLock lock(&mu_);
    first = !std::exchange(draining_, true);
    current = current_;
    pending = pending_;
  }
  if (pending != nullptr) pending->End(absl::UnavailableError("the worker drains"));
  // The router hears of it, takes its turns elsewhere and ends the epoch. One that does not loses them half-way.
  const absl::Time now = absl::Now();
  const bool left = current == nullptr || current->WaitUntilEnded(now + (deadline - now) / 2);
  const bool saved = transfer_->WaitUntilSaved(deadline);
  if (first) common::LogInfo("drained", {{"left_by_router", left}, {"snapshots_saved", saved}});
  if (current != nullptr) current->End(absl::UnavailableError("the worker drains"));
}

bool StageRunner::draining() const {
  absl::MutexLock lock(&mu_);
  return draining_;
}

bool StageRunner::WaitUntilIdle(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithDeadline(absl::Condition(this, &StageRunner::IsIdle), deadline);
}

void StageRunner::Loop() {
  for (;;) {
    std::shared_ptr<Epoch> epoch;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &StageRunner::HasWork));
      if (stopping_) return;
      epoch = std::exchange(pending_, nullptr);
      current_ = epoch;
    }
    RunEpoch(epoch);
    absl::MutexLock lock(&mu_);
    current_ = nullptr;  // `epoch` goes after the lock: its links take a moment to end.
  }
}

void StageRunner::LoseDevice(const absl::Status& why) {
  if (options_.on_device_lost) return options_.on_device_lost(why);
  common::LogError("device_lost", {{"device", engine_->device().name()}, {"why", why}});
  // Without destructors: they would wait for the device.
  std::_Exit(kDeviceLostStatus);
}

void StageRunner::OpenEpoch(Epoch& epoch) {
  if (epoch.sender_ != nullptr && !epoch.ended()) {
    if (absl::Status status = epoch.sender_->Connect(); !status.ok()) epoch.End(status);
  }
  if (epoch.ended()) return;
  common::LogInfo("epoch_opened",
                  {{"epoch", epoch.open().epoch()},
                   {"router", epoch.open().router()},
                   {"stage", absl::StrCat(epoch.open().stage_index(), "/", epoch.open().stage_count())}});
  metrics_->epochs.Increment();
  v1::ExecuteResponse opened;
  opened.mutable_opened();
  epoch.sink_->Send(std::move(opened));
  // Routers open the stage before only now. It waits for this in its Connect().
  if (epoch.receiver_ != nullptr) {
    if (absl::Status status = epoch.receiver_->Join(); !status.ok()) epoch.End(status);
  }
}

void StageRunner::CloseLinks(Epoch& epoch) {
  for (DeviceRows* rows : {epoch.input_rows(), epoch.output_rows()}) {
    if (rows == nullptr) continue;
    if (absl::Status status = rows->End(); absl::IsDeadlineExceeded(status)) {
      LoseDevice(status);
    } else if (!status.ok()) {
      common::LogWarning("link_not_closed", {{"epoch", epoch.open().epoch()}, {"error", status}});
    }
  }
}

void StageRunner::RunEpoch(const std::shared_ptr<Epoch>& epoch) {
  if (absl::Status status = engine_->Reset(); !status.ok()) {
    epoch->End(status);
    LoseDevice(status);
  }
  router_steps_ = engine_steps_ = 0;
  own_steps_ = OwnSteps();
  held_results_ = HeldResults();
  OpenEpoch(*epoch);
  for (;;) {
    while (engine_->pending_steps() > 0 && engine_->IsOldestDone() && !epoch->ended()) FinishStep(epoch);
    const bool is_pending = engine_->pending_steps() > 0;
    const bool has_own_step = own_steps_.ready();
    Epoch::Work work;
    if (has_own_step && own_step_is_due_ && !epoch->ended()) {
      BeginOwnStep(epoch);
    } else if (epoch->Pop(is_pending || has_own_step ? absl::InfinitePast() : held_results_.due(), &work)) {
      Handle(epoch, std::move(work));
    } else if (epoch->ended()) {
      break;
    } else if (held_results_.due() <= absl::Now()) {
      SendResults(*epoch, held_results_.Take());
    } else if (has_own_step) {
      BeginOwnStep(epoch);
    } else if (is_pending) {
      FinishStep(epoch);
    }
    metrics_->slots_used.Set(engine_->slots_used());
  }
  begun_.clear();
  spans_.Clear();
  CloseLinks(*epoch);  // The device may wait for them.
  if (absl::Status status = engine_->Reset(); !status.ok()) LoseDevice(status);
  metrics_->slots_used.Set(0);
  absl::Status why;
  {
    absl::MutexLock lock(&epoch->mu_);
    why = epoch->end_;
  }
  common::LogInfo("epoch_ended", {{"epoch", epoch->open().epoch()}, {"why", why}});
}

void StageRunner::Handle(const std::shared_ptr<Epoch>& epoch, Epoch::Work work) {
  switch (work.kind) {
    case Epoch::Work::Kind::kLoaded:
      return FinishLoad(epoch, std::move(work.loaded));
    case Epoch::Work::Kind::kDrawn:
      return SendStopped(*epoch, own_steps_.OnResult(work.drawn));
    case Epoch::Work::Kind::kOwnFrame:
      return FollowOwnStep(epoch);
    case Epoch::Work::Kind::kCommand:
      SendResults(*epoch, held_results_.Take());  // It may take long.
      break;
  }
  switch (work.command.command_case()) {
    case v1::ExecuteRequest::kAttach:
      return Attach(epoch, work.command.attach());
    case v1::ExecuteRequest::kStep:
      return BeginStep(epoch, std::move(*work.command.mutable_step()));
    case v1::ExecuteRequest::kSave:
      return Save(epoch, work.command.save());
    case v1::ExecuteRequest::kRelease:
      if (engine_->is_first()) own_steps_.OnRelease(work.command.release());
      spans_.OnRelease(work.command.release());
      return engine_->Release(work.command.release());
    case v1::ExecuteRequest::kGoOn:
      return GoOn(epoch, work.command.go_on());
    case v1::ExecuteRequest::kOpen:
    case v1::ExecuteRequest::COMMAND_NOT_SET:
      return epoch->End(absl::InvalidArgumentError("a command that is not attach, step, save, release or go on"));
  }
}

void StageRunner::Attach(const std::shared_ptr<Epoch>& epoch, const v1::AttachSequence& attach) {
  absl::Status status = engine_->Attach(attach);
  // The device's no: all it is asked next would fail as well, and if it has faulted for good the process must end.
  if (absl::IsInternal(status)) return epoch->End(status);
  if (status.ok() && engine_->is_first()) own_steps_.OnAttach(attach);
  spans_.OnAttach(attach);
  if (status.ok() && attach.has_snapshot()) {
    if (epoch->store_ == nullptr) {
      status = absl::FailedPreconditionError("the epoch has no state store");
    } else {
      SnapshotTransfer::LoadJob job;
      job.store = epoch->store_;
      job.records = engine_->RecordsOfStage(attach.snapshot());
      if (attach.keep()) {
        if (std::shared_ptr<StateCopy> kept = kept_->Find(job.records); kept != nullptr) {
          spans_.OnKept(attach.slot(), attach.sequence());
          return FinishLoad(epoch, {attach.slot(), attach.sequence(), std::move(kept)});
        }
      }
      job.trace = spans_.AttachContext(attach.slot(), attach.sequence());
      job.wanted = [epoch] { return !epoch->ended(); };
      const int slot = attach.slot();
      const uint64_t sequence = attach.sequence();
      StateCopies& copies = engine_->copies();
      const auto state = std::make_shared<std::shared_ptr<StateCopy>>();
      job.room = [epoch, state, &copies]() -> absl::StatusOr<std::vector<absl::Span<char>>> {
        absl::StatusOr<std::shared_ptr<StateCopy>> taken = copies.Take();
        if (absl::IsInternal(taken.status())) epoch->End(taken.status());
        RWKV_ASSIGN_OR_RETURN(*state, std::move(taken));
        return (*state)->Room();
      };
      job.done = [epoch, slot, sequence, state, kept = attach.keep() ? kept_ : nullptr, infos = job.records,
                  bytes = copies.bytes()](absl::Status status) {
        if (status.ok()) status = (*state)->CheckRoom();
        if (!status.ok()) return epoch->PushLoaded({slot, sequence, status});
        if (kept != nullptr) kept->Put(infos, *state, bytes);
        epoch->PushLoaded({slot, sequence, std::move(*state)});
      };
      status = transfer_->Load(std::move(job));
      if (status.ok()) return;  // FinishLoad answers.
    }
    engine_->AbandonLoad(attach.slot(), attach.sequence());
  }
  if (!status.ok()) metrics_->attach_errors.Increment();
  spans_.OnAttached(attach.slot(), attach.sequence(), status);
  epoch->sink_->Send(Attached(attach.slot(), attach.sequence(), status));
}

void StageRunner::FinishLoad(const std::shared_ptr<Epoch>& epoch, Epoch::Loaded loaded) {
  absl::Status status = loaded.state.status();
  if (status.ok()) {
    status = engine_->Install(loaded.slot, loaded.sequence, *std::move(loaded.state));
    if (absl::IsInternal(status)) return epoch->End(status);
  } else {
    engine_->AbandonLoad(loaded.slot, loaded.sequence);
  }
  if (!status.ok()) {
    metrics_->attach_errors.Increment();
    common::LogWarning("snapshot_not_loaded", {{"slot", loaded.slot}, {"error", status}});
  }
  spans_.OnAttached(loaded.slot, loaded.sequence, status);
  epoch->sink_->Send(Attached(loaded.slot, loaded.sequence, status));
}

absl::Status StageRunner::BeginSave(const std::shared_ptr<Epoch>& epoch, const v1::SaveSnapshot& save,
                                    const std::shared_ptr<common::Span>& span) {
  if (epoch->store_ == nullptr) return absl::FailedPreconditionError("the epoch has no state store");
  const int64_t bytes = engine_->copies().bytes();
  RWKV_RETURN_IF_ERROR(transfer_->CheckRoom(save.snapshot_id(), bytes));
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<StateCopy> state, engine_->CopyState(save));
  SnapshotTransfer::SaveJob job;
  job.store = epoch->store_;
  job.snapshot_id = save.snapshot_id();
  job.first_layer = engine_->model().weights().layers().begin;
  job.bytes = bytes;
  if (span != nullptr) job.trace = span->context();
  job.records = [state, slot = save.slot()] { return state->Records(slot); };
  job.owner = state;
  job.wanted = [epoch] { return !epoch->ended(); };
  job.done = [epoch, id = save.snapshot_id(), span, state = save.keep() ? std::move(state) : nullptr, kept = kept_,
              bytes](const absl::StatusOr<std::vector<v1::RecordInfo>>& infos) {
    if (span != nullptr && !infos.ok()) span->SetError(infos.status().ToString());
    if (span != nullptr) span->End();
    if (state != nullptr && infos.ok()) kept->Put(*infos, state, bytes);
    if (!infos.ok() && !epoch->ended()) {
      common::LogWarning("snapshot_not_saved", {{"snapshot", id}, {"error", infos.status()}});
    }
    epoch->sink_->Send(Saved(id, infos));
  };
  return transfer_->Save(std::move(job));
}

void StageRunner::Save(const std::shared_ptr<Epoch>& epoch, const v1::SaveSnapshot& save) {
  const std::shared_ptr<common::Span> span = spans_.OnSave(save);
  const absl::Status status = BeginSave(epoch, save, span);
  if (status.ok()) return;  // The job answers.
  if (absl::IsInternal(status)) return epoch->End(status);
  if (span != nullptr) span->SetError(status.ToString());
  epoch->sink_->Send(Saved(save.snapshot_id(), status));
}

}  // namespace rwkv::worker
