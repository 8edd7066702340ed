// Snapshots of turns: when one is taken, and what follows when it is there.
#include <utility>

#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

bool TurnCore::MaySave(const Turn& turn) const {
  return turn.HasLog() && turn.saves == 0 && saves_.size() < kSavesPerSlot * placement_.TotalSlots();
}

void TurnCore::SavePrefix(Turn& turn) {
  // Half of what may be on its way, so that sessions are saved in time.
  if (saves_.size() >= static_cast<size_t>(placement_.TotalSlots()) || prefixes_.SavesPause()) return;
  saves_.BeginPrefix(turn, prefixes_.Put(turn, turn.planned_end), turn.prefix.unusable);
}

void TurnCore::OnSaveEnded(const PendingSave& save, bool is_whole, const absl::Status& status) {
  const auto turn = running_.find(save.turn_id);
  if (turn == running_.end()) return;  // What it left behind without a session is swept as an orphan.
  const TurnPtr owner = turn->second;
  --owner->saves;
  if (save.session_id.empty() && status.ok()) {
    DropOwn(*owner);
    owner->own_snapshot = Saves::ManifestOf(save);
  }
  if (!owner->kind->AwaitsSave(save.snapshot_id)) return;
  // Whether or not the manifest could be committed (of an empty session, for instance).
  if (is_whole) owner->kind->OnSnapshot(*owner, Saves::ManifestOf(save));
  if (owner->kind->IsOpen()) return Fail(*owner, status);
  EndCall(*owner, absl::OkStatus());
  if (owner->phase == Phase::kRunning) SaveAndRetire(*owner);
}

void TurnCore::DropOwn(Turn& turn) {
  if (turn.own_snapshot.snapshot_id().empty()) return;
  v1::DropSnapshotRequest drop;
  drop.set_snapshot_id(turn.own_snapshot.snapshot_id());
  turn.own_snapshot.Clear();
  // If it stays, it is swept as an orphan.
  world_->Run(World::Queue::kSnapshot,
              [this, drop = std::move(drop)] { (void)catalog_->DropSnapshot(drop, StoreDeadline()); });
  placement_.DropWarm(WarmSession(turn));
}

void TurnCore::SaveAndRetire(Turn& turn) {
  if (turn.planned_end > turn.saved_position) saves_.Begin(turn);
  turn.lane->scheduler.Retire(turn.sequence, turn.session_id, turn.session->log_branch);
  LeaveSlot(turn);
  turn.phase = Phase::kComputed;
  KeepSlot(turn);
}

}  // namespace rwkv::router
