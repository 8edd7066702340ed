// Snapshots, from the command to the manifest.
#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Kind = Turn::Kind;
using Phase = Turn::Phase;

}  // namespace

PendingSave* TurnCore::BeginSave(Turn& turn, std::shared_ptr<const v1::PutPrefixRequest> prefix) {
  const absl::optional<uint64_t> position = turn.lane->scheduler.Save(turn.sequence);
  if (!position.has_value()) return nullptr;
  const std::string id = absl::StrFormat("%016x%016x", world_->Random(), world_->Random());
  PendingSave& save = saves_[id];
  save.snapshot_id = id;
  save.model_fingerprint = turn.model->info.fingerprint();
  save.trace = turn.trace;
  save.epoch = turn.lane->epoch;
  save.position = *position;
  save.answers_left = static_cast<int>(turn.lane->plan.stages.size());
  save.deadline = Now() + options_.save_timeout;
  save.prefix = std::move(prefix);
  turn.lane->save_ids.emplace(std::make_pair(turn.sequence, *position), id);
  return &save;
}

bool TurnCore::Save(Turn& turn) {
  PendingSave* const save = BeginSave(turn, nullptr);
  if (save == nullptr) return false;
  save->session_id = turn.session_id;
  save->turn_id = turn.id;
  if (turn.kind == Kind::kExport) turn.export_snapshot = save->snapshot_id;
  turn.saved_position = save->position;
  ++turn.saves;
  if (turn.session != nullptr) ++turn.session->saves;
  return true;
}

void TurnCore::OnSaved(const v1::SnapshotSaved& saved) {
  const auto it = saves_.find(saved.snapshot_id());
  if (it == saves_.end()) return;
  PendingSave& save = it->second;
  const absl::Status status = common::FromStatusProto(saved.status());
  if (!status.ok() && save.status.ok()) save.status = status;
  save.records.insert(save.records.end(), saved.records().begin(), saved.records().end());
  --save.answers_left;
}

v1::SnapshotManifest TurnCore::ManifestOf(const PendingSave& save) {
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

void TurnCore::SweepSaves() {
  const absl::Time now = Now();
  std::vector<std::pair<std::string, absl::Status>> over;
  for (auto& [id, save] : saves_) {
    if (save.committing) continue;
    if (now >= save.deadline) {
      over.emplace_back(id, absl::DeadlineExceededError("the snapshot took too long"));
      continue;
    }
    if (save.answers_left > 0) continue;
    if (!save.status.ok()) {
      over.emplace_back(id, save.status);
      continue;
    }
    if (save.prefix != nullptr) {
      CommitPrefix(id, save);
      continue;
    }
    if (save.session_id.empty()) {  // Its turn alone knows of it.
      over.emplace_back(id, absl::OkStatus());
      continue;
    }
    const Session& session = *sessions_.Find(save.session_id);
    if (!session.leased) {
      over.emplace_back(id, absl::AbortedError("the lease is lost"));
      continue;
    }
    if (session.durable_length < save.position) continue;  // The log comes first.
    if (save.position == 0) {  // Of an export: the initial state is no snapshot of anything.
      over.emplace_back(id, absl::OkStatus());
      continue;
    }
    v1::CommitSnapshotRequest request;
    *request.mutable_lease() = session.lease;
    request.set_log_branch(session.log_branch);
    *request.mutable_manifest() = ManifestOf(save);
    save.committing = RunStoreJob<absl::Status>(
        world_,
        Traced<absl::Status>(save.trace,
                             [this, request = std::move(request)] {
                               return catalog_->CommitSnapshot(request, StoreDeadline()).status();
                             }),
        [this, id = id](absl::Status status) { OnManifest(id, status); });
  }
  for (const auto& [id, status] : over) {
    if (status.ok()) {
      OnManifest(id, status);
    } else {
      EndSave(id, status);
    }
  }
}

void TurnCore::OnManifest(const std::string& snapshot_id, const absl::Status& status) {
  const auto it = saves_.find(snapshot_id);
  if (it == saves_.end()) return;
  const auto turn = running_.find(it->second.turn_id);
  if (turn != running_.end() && turn->second->export_snapshot == snapshot_id) {
    // The records are there whether or not the manifest could be committed (of an empty session, for instance).
    const TurnPtr exporting = turn->second;
    if (auto done = std::exchange(exporting->export_done, nullptr)) {
      done(ExportedState{ManifestOf(it->second), exporting->model->state_layout});
    }
  }
  EndSave(snapshot_id, status);
}

void TurnCore::EndSave(const std::string& snapshot_id, const absl::Status& status) {
  const auto it = saves_.find(snapshot_id);
  if (it == saves_.end()) return;
  const PendingSave save = it->second;
  saves_.erase(it);
  const bool has_session = !save.session_id.empty();
  if (has_session) --sessions_.Find(save.session_id)->saves;
  if (has_session && save.position > 0)
    (status.ok() ? metrics_->snapshots_committed : metrics_->snapshots_failed).Increment();
  if (save.prefix != nullptr) OnPrefixSaved(snapshot_id, status);
  if (!status.ok()) {
    common::LogWarning("snapshot_failed",
                       {{"session", save.session_id}, {"position", save.position}, {"status", status}});
  }
  const auto turn = running_.find(save.turn_id);
  if (turn == running_.end()) return;  // What it left behind without a session is swept as an orphan.
  const TurnPtr owner = turn->second;
  --owner->saves;
  if (!has_session && status.ok()) {
    DropOwn(*owner);
    owner->own_snapshot = ManifestOf(save);
  }
  if (owner->export_snapshot != snapshot_id) return;
  owner->export_snapshot.clear();
  if (owner->export_done != nullptr) return Fail(*owner, status);
  EndCall(*owner, absl::OkStatus());
  if (owner->phase == Phase::kRunning) SaveAndRetire(*owner);
}

void TurnCore::DropOwn(Turn& turn) {
  if (turn.own_snapshot.snapshot_id().empty()) return;
  v1::DropSnapshotRequest drop;
  drop.set_snapshot_id(turn.own_snapshot.snapshot_id());
  turn.own_snapshot.Clear();
  // If it stays, it is swept as an orphan.
  world_->Run(World::Queue::kStore,
              [this, drop = std::move(drop)] { (void)catalog_->DropSnapshot(drop, StoreDeadline()); });
  placement_.DropWarm(WarmSession(turn));
}

void TurnCore::SaveAndRetire(Turn& turn) {
  if (turn.planned_end > turn.saved_position) Save(turn);
  turn.lane->scheduler.Retire(turn.sequence, turn.session_id, turn.session->log_branch);
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
  turn.lane = nullptr;
  turn.tail.clear();
  turn.yielding = false;
  turn.phase = Phase::kComputed;
  KeepSlot(turn);
}

void TurnCore::Yield(const TurnPtr& turn) {
  if (turn->planned_end > turn->saved_position) Save(*turn);
  turn->lane->scheduler.Retire(turn->sequence, WarmSession(*turn), WarmBranch(*turn));
  by_sequence_.erase(turn->sequence);
  turn->sequence = 0;
  turn->lane = nullptr;
  turn->tail.clear();
  turn->yielding = false;
  turn->yielded = true;
  turn->phase = Phase::kYielded;
  ++yielded_;
  waiting_.push_back(turn);
  metrics_->yielded_turns.Increment();
}

}  // namespace rwkv::router
