#include "services/router/core/saves.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/core/turn_lane.h"

namespace rwkv::router {
namespace {

// Snapshots on their way at a time, as a multiple of the slots.
constexpr int kPerSlot = 2;

}  // namespace

Saves::Saves(const CoreContext& context, const Placement& placement, SessionTable* sessions, Prefixes* prefixes,
             Ended ended)
    : context_(context), placement_(placement), sessions_(sessions), prefixes_(prefixes), ended_(std::move(ended)) {}

int Saves::room() const { return kPerSlot * placement_.TotalSlots() - static_cast<int>(saves_.size()); }

const PendingSave* Saves::Find(const std::string& snapshot_id) const {
  const auto it = saves_.find(snapshot_id);
  return it == saves_.end() ? nullptr : &it->second;
}

bool Saves::UseLane(uint64_t epoch) const {
  return std::any_of(saves_.begin(), saves_.end(),
                     [epoch](const auto& save) { return save.second.epoch == epoch && save.second.answers_left > 0; });
}

PendingSave* Saves::Add(Turn& turn) {
  const absl::optional<uint64_t> position = turn.lane->scheduler.Save(turn.sequence);
  if (!position.has_value()) return nullptr;
  const std::string id = absl::StrFormat("%016x%016x", context_.world->Random(), context_.world->Random());
  PendingSave& save = saves_[id];
  save.snapshot_id = id;
  save.model_fingerprint = turn.model->info.fingerprint();
  save.trace = turn.trace;
  save.epoch = turn.lane->epoch;
  save.position = *position;
  save.answers_left = static_cast<int>(turn.lane->plan.stages.size());
  save.deadline = context_.world->Now() + context_.options.save_timeout;
  deadlines_.emplace(save.deadline, id);
  turn.lane->save_ids.emplace(std::make_pair(turn.sequence, *position), id);
  return &save;
}

bool Saves::IsOf(const Session& session, const PendingSave& save) {
  return session.leased && session.lease.fencing_token() == save.lease.fencing_token() &&
         session.log_branch == save.log_branch;
}

const PendingSave* Saves::Begin(Turn& turn) {
  PendingSave* const save = Add(turn);
  if (save == nullptr) return nullptr;
  save->session_id = turn.session_id;
  if (!turn.session_id.empty()) of_session_[turn.session_id].insert(save->snapshot_id);
  save->turn_id = turn.id;
  turn.saved_position = save->position;
  ++turn.saves;
  if (turn.session == nullptr) return save;
  save->lease = turn.session->lease;
  save->log_branch = turn.session->log_branch;
  ++turn.session->saves;
  return save;
}

void Saves::BeginPrefix(Turn& turn) {
  // Half of what may be on its way, so that sessions are saved in time.
  if (static_cast<int>(saves_.size()) >= placement_.TotalSlots() || prefixes_->SavesPause()) return;
  PendingSave* const save = Add(turn);
  if (save == nullptr) return;
  save->prefix = prefixes_->Put(turn, turn.planned_end);
  save->replaces = turn.prefix.unusable;
}

void Saves::OnSaved(const v1::SnapshotSaved& saved) {
  const auto it = saves_.find(saved.snapshot_id());
  if (it == saves_.end()) return;
  PendingSave& save = it->second;
  const absl::Status status = common::FromStatusProto(saved.status());
  if (!status.ok() && save.status.ok()) save.status = status;
  save.records.insert(save.records.end(), saved.records().begin(), saved.records().end());
  --save.answers_left;
  touched_.insert(saved.snapshot_id());
}

void Saves::LogGrew(const Session& session) { TouchOf(session.id); }

void Saves::TouchOf(const std::string& session_id) {
  const auto own = of_session_.find(session_id);
  if (own != of_session_.end()) touched_.insert(own->second.begin(), own->second.end());
}

void Saves::Touch() {
  for (const auto& [id, save] : saves_) touched_.insert(id);
}

v1::SnapshotManifest Saves::ManifestOf(const PendingSave& save) {
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id(save.snapshot_id);
  manifest.set_session_id(save.session_id);
  manifest.set_position(save.position);
  manifest.set_model_fingerprint(save.model_fingerprint);
  std::vector<v1::RecordInfo> records = save.records;
  std::sort(records.begin(), records.end(),
            [](const v1::RecordInfo& a, const v1::RecordInfo& b) { return a.layer() < b.layer(); });
  for (const v1::RecordInfo& record : records) *manifest.add_records() = record;
  return manifest;
}

void Saves::Sweep() {
  struct Over {
    std::string id;
    bool is_whole;
    absl::Status status;
  };
  std::vector<Over> over;
  const absl::Time now = context_.world->Now();
  for (const auto& [deadline, id] : deadlines_) {
    if (deadline > now) break;
    touched_.insert(id);
  }
  for (const std::string& session_id : sessions_->touched()) TouchOf(session_id);
  for (const std::string& id : std::exchange(touched_, {})) {
    const auto it = saves_.find(id);
    if (it == saves_.end() || it->second.committing) continue;
    PendingSave& save = it->second;
    if (now >= save.deadline) {
      over.push_back({id, false, absl::DeadlineExceededError("the snapshot took too long")});
      continue;
    }
    const Session* const session = save.session_id.empty() ? nullptr : sessions_->Find(save.session_id);
    if (session != nullptr && !IsOf(*session, save)) {
      over.push_back({id, false, absl::AbortedError("the lease is lost")});
      continue;
    }
    if (save.answers_left > 0) continue;
    if (!save.status.ok()) {
      over.push_back({id, false, save.status});
    } else if (save.prefix != nullptr) {
      Commit(id, save);
    } else if (session == nullptr) {  // Its turn alone knows of it.
      over.push_back({id, true, absl::OkStatus()});
    } else if (session->durable_length < save.position) {
      continue;                       // The log comes first.
    } else if (save.position == 0) {  // Of an export: the initial state is no snapshot of anything.
      over.push_back({id, true, absl::OkStatus()});
    } else {
      Commit(id, save);
    }
  }
  for (const Over& one : over) End(one.id, one.is_whole, one.status);
}

void Saves::Commit(const std::string& id, PendingSave& save) {
  std::function<absl::Status()> work;
  if (save.prefix != nullptr) {
    work = prefixes_->CommitJob(save, ManifestOf(save));
  } else {
    v1::CommitSnapshotRequest request;
    *request.mutable_lease() = save.lease;
    request.set_log_branch(save.log_branch);
    *request.mutable_manifest() = ManifestOf(save);
    work = [this, request = std::move(request)] {
      return context_.catalog->CommitSnapshot(request, context_.StoreDeadline()).status();
    };
  }
  save.committing = RunStoreJob<absl::Status>(
      context_.world, Traced<absl::Status>(save.trace, std::move(work)),
      [this, id](absl::Status status) { End(id, true, status); }, World::Queue::kSnapshot);
  if (!save.committing) touched_.insert(id);  // Too much waits for the store just now: the next sweep asks again.
}

void Saves::EndOfLane(uint64_t epoch, const absl::Status& why) {
  std::vector<std::string> lost;
  for (const auto& [id, save] : saves_) {
    if (save.epoch == epoch && !save.committing && save.answers_left > 0) lost.push_back(id);
  }
  for (const std::string& id : lost) End(id, false, why);
}

void Saves::EndBeyond(const Session& session, const absl::Status& why) {
  std::vector<std::string> beyond;
  const auto own = of_session_.find(session.id);
  if (own == of_session_.end()) return;
  for (const std::string& id : own->second) {
    if (saves_.at(id).position > session.durable_length) beyond.push_back(id);
  }
  for (const std::string& id : beyond) End(id, false, why);
}

void Saves::End(const std::string& snapshot_id, bool is_whole, const absl::Status& status) {
  const auto it = saves_.find(snapshot_id);
  if (it == saves_.end()) return;
  const PendingSave save = std::move(it->second);
  saves_.erase(it);
  deadlines_.erase({save.deadline, snapshot_id});
  if (const auto own = of_session_.find(save.session_id); own != of_session_.end()) {
    own->second.erase(snapshot_id);
    if (own->second.empty()) of_session_.erase(own);
  }
  if (!save.session_id.empty()) {
    Session& session = *sessions_->Find(save.session_id);
    --session.saves;
    sessions_->Touch(session);
    if (save.position > 0) {
      (status.ok() ? context_.metrics->snapshots_committed : context_.metrics->snapshots_failed).Increment();
    }
  }
  if (save.prefix != nullptr) prefixes_->OnSaveEnded(snapshot_id, status);
  if (!status.ok()) {
    common::LogWarning("snapshot_failed",
                       {{"session", save.session_id}, {"position", save.position}, {"status", status}});
  }
  ended_(save, is_whole, status);
}

}  // namespace rwkv::router
