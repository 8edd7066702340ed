// The prefix cache: a turn that begins with nothing looks for a state after the longest beginning of its input that
// somebody has read, and leaves states of its own where PrefixEnds() says. Whatever of it fails is a miss.
#include <algorithm>
#include <utility>

#include "services/router/prefix_cache/prefix_ends.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Kind = Turn::Kind;
using Phase = Turn::Phase;

// Reading anew is never far.
constexpr absl::Duration kLookupLimit = absl::Milliseconds(500);
// Nobody asks for so long after the store could not be asked, or keeps after that did not work out: there is no such
// cache, or workers have more to save than they can. Sessions' states come first.
constexpr absl::Duration kPauseAfterError = absl::Seconds(5);

}  // namespace

bool TurnCore::UsesPrefixes(const Turn& turn) const {
  return options_.prefix_cache.enabled && turn.kind == Kind::kGenerate && turn.begin == 0 &&
         turn.prompt.size() > kShortestPrefix && !(turn.session != nullptr && turn.session->base_position.has_value());
}

// A clock that was set back ends a pause.
bool TurnCore::PausesPrefixes(absl::Time failed) const {
  const absl::Duration since = Now() - failed;
  return since >= absl::ZeroDuration() && since < kPauseAfterError;
}

v1::PrefixScope TurnCore::PrefixScopeOf(const Turn& turn) const {
  v1::PrefixScope scope;
  scope.set_tenant(turn.tenant);
  scope.set_model_fingerprint(turn.model->info.fingerprint());
  scope.set_numeric_family(placement_.pools().at(turn.pool).numeric_family);
  scope.set_initial_state(turn.initial_state);
  return scope;
}

void TurnCore::PlanPrefixes(Turn& turn) {
  if (turn.prefix.planned || !UsesPrefixes(turn)) return;
  turn.prefix.planned = true;
  const std::string scope = PrefixScopeOf(turn).SerializeAsString();
  const uint64_t shared =
      turn.prompt.size() > options_.prefix_cache.min_tokens ? recent_inputs_.Add(scope, turn.prompt) : 0;
  turn.prefix.ends = PrefixEnds(options_.prefix_cache, turn.prompt.size(), turn.prefix.marks, shared);
}

absl::optional<v1::FindPrefixRequest> TurnCore::PrefixLookup(const Turn& turn) const {
  // A beginning that is too short to be kept is too short to be there, unless it was marked.
  if (!UsesPrefixes(turn) || turn.prefix.off || turn.prefix.ends.empty() || turn.patience.LeavesSnapshots(Now()) ||
      PausesPrefixes(prefix_lookup_failed_)) {
    return absl::nullopt;
  }
  v1::FindPrefixRequest find;
  *find.mutable_scope() = PrefixScopeOf(turn);
  const uint64_t most = std::min<uint64_t>({turn.prompt.size(), turn.StateEnd(), kLongestPrefix});
  find.mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.begin() + static_cast<int64_t>(most));
  return find;
}

void TurnCore::FindPrefix(const v1::FindPrefixRequest& find, Located* located) const {
  if (located->manifest.position() >= static_cast<uint64_t>(find.token_ids_size())) return;
  absl::StatusOr<v1::FindPrefixResponse> found =
      catalog_->FindPrefix(find, std::min(StoreDeadline(), world_->CallClock() + kLookupLimit));
  located->prefix_status = found.status();
  located->asked_for_prefix = true;
  if (!found.ok() || found->manifest().position() <= located->manifest.position()) return;
  located->manifest = std::move(*found->mutable_manifest());
  located->is_prefix = true;
}

void TurnCore::LocatePrefix(const TurnPtr& turn, v1::FindPrefixRequest find) {
  turn->phase = Phase::kLocating;
  TraceStage(*turn);
  const auto work = [this, find = std::move(find)] {
    Located located;
    FindPrefix(find, &located);
    return located;
  };
  if (RunStoreJob<Located>(world_, Traced<Located>(turn->trace, work),
                           [this, turn](Located located) { OnLocated(turn, std::move(located)); })) {
    return;
  }
  Admit(turn, 0);
}

void TurnCore::CountPrefixLookup(Turn& turn, const Located& located) {
  turn.prefix.attached = located.is_prefix;
  if (!located.asked_for_prefix) return;
  if (!located.prefix_status.ok()) {
    prefix_lookup_failed_ = Now();
  }
  if (std::exchange(turn.prefix.counted, true)) return;
  (!located.prefix_status.ok() ? metrics_->prefix_errors
   : located.is_prefix         ? metrics_->prefix_hits
                               : metrics_->prefix_misses)
      .Increment();
}

uint64_t TurnCore::PrefixFeedEnd(Turn& turn) const {
  const std::vector<uint64_t>& ends = turn.prefix.ends;
  size_t& next = turn.prefix.next_end;
  while (next < ends.size() && ends[next] <= turn.attach_position) ++next;
  return next == ends.size() ? UINT64_MAX : ends[next];
}

bool TurnCore::FeedPastPrefix(Turn& turn) {
  if (turn.prefix.next_end == turn.prefix.ends.size()) return false;
  const uint64_t end = turn.prefix.ends[turn.prefix.next_end];
  if (turn.planned_end < end) return true;  // On its way there.
  if (turn.planned_end == end) SavePrefix(turn);
  ++turn.prefix.next_end;
  const uint64_t fed = turn.fed_end;
  FeedKnown(turn);
  return turn.prefix.next_end < turn.prefix.ends.size() || turn.fed_end > fed;
}

void TurnCore::SavePrefix(Turn& turn) {
  // Half of what may be on its way, so that sessions are saved in time.
  if (saves_.size() >= static_cast<size_t>(placement_.TotalSlots()) || PausesPrefixes(prefix_save_failed_)) return;
  auto put = std::make_shared<v1::PutPrefixRequest>();
  *put->mutable_scope() = PrefixScopeOf(turn);
  put->mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.begin() + static_cast<int64_t>(turn.planned_end));
  PendingSave* const save = BeginSave(turn, std::move(put));
  if (save != nullptr) save->replaces = turn.prefix.unusable;
}

bool TurnCore::CommitPrefix(const std::string& id, PendingSave& save) {
  v1::PutPrefixRequest request = *save.prefix;
  *request.mutable_manifest() = ManifestOf(save);
  v1::DropPrefixRequest drop;
  drop.set_snapshot_id(save.replaces);
  drop.set_reason("it is read again");
  const auto work = [this, request = std::move(request), drop = std::move(drop)] {
    // Again, lest what could not be dropped when it was found keeps its place.
    if (!drop.snapshot_id().empty()) (void)catalog_->DropPrefix(drop, StoreDeadline());
    return catalog_->PutPrefix(request, StoreDeadline()).status();
  };
  save.committing = RunStoreJob<absl::Status>(world_, Traced<absl::Status>(save.trace, work),
                                              [this, id](absl::Status status) { EndSave(id, status); });
  return save.committing;
}

void TurnCore::OnPrefixSaved(const std::string& snapshot_id, const absl::Status& status) {
  if (status.ok()) return metrics_->prefixes_kept.Increment();
  prefix_save_failed_ = Now();
  v1::DropSnapshotRequest drop;
  drop.set_snapshot_id(snapshot_id);
  // If they stay, they are swept as orphans.
  world_->Run(World::Queue::kStore,
              [this, drop = std::move(drop)] { (void)catalog_->DropSnapshot(drop, StoreDeadline()); });
}

bool TurnCore::OnPrefixAttachFailed(Turn& turn, const absl::Status& status, bool unusable) {
  if (!std::exchange(turn.prefix.attached, false)) return false;
  turn.prefix.off = true;  // It is read,
  if (!unusable) return true;
  turn.prefix.next_end = 0;  // and kept anew.
  turn.prefix.unusable = turn.snapshot.snapshot_id();
  v1::DropPrefixRequest drop;
  drop.set_snapshot_id(turn.snapshot.snapshot_id());
  drop.set_reason(status.ToString());
  world_->Run(World::Queue::kStore,
              [this, drop = std::move(drop)] { (void)catalog_->DropPrefix(drop, StoreDeadline()); });
  return true;
}

}  // namespace rwkv::router
