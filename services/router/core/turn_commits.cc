#include "services/router/core/turn_commits.h"

#include <algorithm>
#include <utility>

#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::router {

TurnCommits::TurnCommits(const CoreContext& context, const TurnTable& turns, const Placement& placement, Saves* saves,
                         TurnSlots* slots, TurnEnds* ends)
    : context_(context),
      turns_(turns),
      placement_(placement),
      saves_(saves),
      slots_(slots),
      ends_(ends),
      writer_(context.world, context.catalog,
              [this](const std::vector<LogWriter::Item>& items, absl::Duration took) { OnCommitted(items, took); }) {}

void TurnCommits::Look(const Turn& turn) {
  if (turn.IsCommitted()) {
    uncommitted_.erase(turn.id);
  } else {
    uncommitted_.insert(turn.id);
  }
}

void TurnCommits::Sweep() {
  writer_.Sweep(context_.stopping);
  if (writer_.busy()) return;
  LogWriter::Batch batch;
  for (const uint64_t id : uncommitted_) {
    if (batch.full()) break;
    Turn& turn = *turns_.running().at(id);
    if (turn.session == nullptr || !turn.session->leased || turn.IsCommitted()) continue;
    batch.Add(turn);
    turn.committing = true;
  }
  if (!batch.items.empty()) writer_.Begin(std::move(batch), context_.StoreDeadline());
}

void TurnCommits::OnCommitted(const std::vector<LogWriter::Item>& items, absl::Duration took) const {
  context_.metrics->store_commit_seconds.Observe(absl::ToDoubleSeconds(took));
  if (std::any_of(items.begin(), items.end(), [](const LogWriter::Item& item) { return item.status.ok(); })) {
    context_.metrics->last_commit_timestamp_seconds.Set(absl::ToDoubleSeconds(context_.Now() - absl::UnixEpoch()));
  }
  for (const LogWriter::Item& result : items) {
    const TurnPtr turn = turns_.Find(result.turn_id);
    if (turn == nullptr) continue;
    turn->committing = false;
    if (!result.status.ok()) {
      OnFailed(*turn, result.status);
      continue;
    }
    turn->durable += result.tokens;
    if (result.finish) {
      turn->finish_durable = true;
      context_.metrics->CountFinish(turn->answer->reason());
    }
    // Kept while its turn is committing.
    turn->session->durable_length = turn->begin + turn->prompt.size() + turn->durable;
    saves_->LogGrew(*turn->session);
  }
}

void TurnCommits::OnFailed(Turn& turn, const absl::Status& status) const {
  common::LogWarning("commit_failed", {{"status", status}});
  Session& session = *turn.session;  // Kept while its turn is committing.
  turn.abandoned = true;
  session.stale = true;
  ends_->Fail(turn, context_.StoreError(status));
  if (turn.sequence != 0) slots_->Remove(turn);
  placement_.DropWarm(session.id);
  saves_->EndBeyond(session, absl::AbortedError("its tokens are not in the log"));
}

void TurnCommits::OnLeaseLost(Session& session) const {
  placement_.DropWarm(session.id);
  if (session.turn == nullptr) return;
  const TurnPtr turn = session.turn;
  turn->abandoned = true;
  ends_->Fail(*turn,
              common::WithRetryInfo(absl::AbortedError("another router has taken over the session"), absl::Seconds(1)));
}

}  // namespace rwkv::router
