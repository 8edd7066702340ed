#include "services/router/core/prefixes.h"

#include <algorithm>
#include <utility>

#include "absl/status/statusor.h"
#include "services/router/prefix_cache/prefix_ends.h"

namespace rwkv::router {
namespace {

// Reading anew is never far.
constexpr absl::Duration kLookupLimit = absl::Milliseconds(500);
// Nobody asks for so long after the store could not be asked, or keeps after that did not work out: there is no such
// cache, or workers have more to save than they can. Sessions' states come first.
constexpr absl::Duration kPauseAfterError = absl::Seconds(5);

}  // namespace

bool Prefixes::Uses(const Turn& turn) const {
  return context_.options.prefix_cache.enabled && turn.kind->generates() && turn.begin == 0 &&
         turn.prompt.size() > kShortestPrefix && !(turn.session != nullptr && turn.session->base_position.has_value());
}

// A clock that was set back ends a pause.
bool Prefixes::Pauses(absl::Time failed) const {
  const absl::Duration since = context_.world->Now() - failed;
  return since >= absl::ZeroDuration() && since < kPauseAfterError;
}

v1::PrefixScope Prefixes::ScopeOf(const Turn& turn) const {
  v1::PrefixScope scope;
  scope.set_tenant(turn.tenant);
  scope.set_model_fingerprint(turn.model->info.fingerprint());
  scope.set_numeric_family(placement_.pools().at(turn.pool()).numeric_family);
  scope.set_initial_state(turn.initial_state);
  return scope;
}

void Prefixes::Plan(Turn& turn) {
  if (turn.prefix.planned || !Uses(turn)) return;
  turn.prefix.planned = true;
  const std::string scope = ScopeOf(turn).SerializeAsString();
  const uint64_t shared =
      turn.prompt.size() > context_.options.prefix_cache.min_tokens ? recent_inputs_.Add(scope, turn.prompt) : 0;
  turn.prefix.ends = PrefixEnds(context_.options.prefix_cache, turn.prompt.size(), turn.prefix.marks, shared);
}

absl::optional<v1::FindPrefixRequest> Prefixes::Lookup(const Turn& turn) const {
  // A beginning that is too short to be kept is too short to be there, unless it was marked.
  if (!Uses(turn) || turn.prefix.off || turn.prefix.ends.empty() ||
      turn.patience.LeavesSnapshots(context_.world->Now()) || Pauses(lookup_failed_)) {
    return absl::nullopt;
  }
  v1::FindPrefixRequest find;
  *find.mutable_scope() = ScopeOf(turn);
  const uint64_t most = std::min<uint64_t>({turn.prompt.size(), turn.StateEnd(), kLongestPrefix});
  find.mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.begin() + static_cast<int64_t>(most));
  return find;
}

void Prefixes::Find(const v1::FindPrefixRequest& find, Located* located) const {
  if (located->manifest.position() >= static_cast<uint64_t>(find.token_ids_size())) return;
  absl::StatusOr<v1::FindPrefixResponse> found = context_.catalog->FindPrefix(
      find, std::min(context_.StoreDeadline(), context_.world->CallClock() + kLookupLimit));
  located->prefix_status = found.status();
  located->asked_for_prefix = true;
  if (!found.ok() || found->manifest().position() <= located->manifest.position()) return;
  located->manifest = std::move(*found->mutable_manifest());
  located->is_prefix = true;
}

void Prefixes::OnFound(Turn& turn, const Located& located) {
  turn.prefix.attached = located.is_prefix;
  if (!located.asked_for_prefix) return;
  if (!located.prefix_status.ok()) lookup_failed_ = context_.world->Now();
  if (std::exchange(turn.prefix.counted, true)) return;  // It may be looked up again after a loss.
  (!located.prefix_status.ok() ? context_.metrics->prefix_errors
   : located.is_prefix         ? context_.metrics->prefix_hits
                               : context_.metrics->prefix_misses)
      .Increment();
}

uint64_t Prefixes::FeedEnd(Turn& turn) {
  const std::vector<uint64_t>& ends = turn.prefix.ends;
  size_t& next = turn.prefix.next_end;
  while (next < ends.size() && ends[next] <= turn.attach_position) ++next;
  return next == ends.size() ? UINT64_MAX : ends[next];
}

std::shared_ptr<const v1::PutPrefixRequest> Prefixes::Put(const Turn& turn, uint64_t position) const {
  auto put = std::make_shared<v1::PutPrefixRequest>();
  *put->mutable_scope() = ScopeOf(turn);
  put->mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.begin() + static_cast<int64_t>(position));
  return put;
}

std::function<absl::Status()> Prefixes::CommitJob(const PendingSave& save, const v1::SnapshotManifest& manifest) const {
  v1::PutPrefixRequest request = *save.prefix;
  *request.mutable_manifest() = manifest;
  v1::DropPrefixRequest drop;
  drop.set_snapshot_id(save.replaces);
  drop.set_reason("it is read again");
  return [this, request = std::move(request), drop = std::move(drop)] {
    // Again, lest what could not be dropped when it was found keeps its place.
    if (!drop.snapshot_id().empty()) (void)context_.catalog->DropPrefix(drop, context_.StoreDeadline());
    return context_.catalog->PutPrefix(request, context_.StoreDeadline()).status();
  };
}

void Prefixes::OnSaveEnded(const std::string& snapshot_id, const absl::Status& status) {
  if (status.ok()) return context_.metrics->prefixes_kept.Increment();
  save_failed_ = context_.world->Now();
  v1::DropSnapshotRequest drop;
  drop.set_snapshot_id(snapshot_id);
  // If they stay, they are swept as orphans.
  context_.world->Run(World::Queue::kSnapshot, [this, drop = std::move(drop)] {
    (void)context_.catalog->DropSnapshot(drop, context_.StoreDeadline());
  });
}

bool Prefixes::OnAttachFailed(Turn& turn, const absl::Status& status, bool unusable) {
  if (!std::exchange(turn.prefix.attached, false)) return false;
  turn.prefix.off = true;  // It is read,
  if (!unusable) return true;
  turn.prefix.next_end = 0;  // and kept anew.
  turn.prefix.unusable = turn.snapshot.snapshot_id();
  v1::DropPrefixRequest drop;
  drop.set_snapshot_id(turn.snapshot.snapshot_id());
  drop.set_reason(status.ToString());
  context_.world->Run(World::Queue::kSnapshot, [this, drop = std::move(drop)] {
    (void)context_.catalog->DropPrefix(drop, context_.StoreDeadline());
  });
  return true;
}

}  // namespace rwkv::router
