// Group commit: the new tokens and ends of all turns, one append at a time, until it is known what became of it.
#include <algorithm>
#include <utility>

#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

constexpr size_t kMaxItemsPerCommit = 1024;
constexpr absl::Duration kMinCommitBackoff = absl::Milliseconds(10);
constexpr absl::Duration kMaxCommitBackoff = absl::Milliseconds(500);
constexpr absl::Duration kCommitAttempt = absl::Seconds(5);

}  // namespace

void TurnCore::SweepCommits() {
  if (commit_ != nullptr) {
    if (!commit_->running && (world_->CallClock() >= commit_->not_before || stopping_)) TryCommit();
    return;
  }
  v1::AppendTokensRequest request;
  std::vector<CommitResult> results;
  std::vector<uint64_t> turn_tokens;
  for (auto& [id, turn] : running_) {
    if (request.items_size() >= kMaxItemsPerCommit) break;
    if (!turn->HasLog() || turn->session == nullptr || !turn->session->leased || CommitClean(*turn)) continue;
    const Answer& answer = *turn->answer;
    v1::AppendItem& item = *request.add_items();
    *item.mutable_lease() = turn->session->lease;
    item.set_request_id(turn->request_id);
    item.set_expected_length(turn->begin + turn->prompt.size() + turn->durable);
    item.mutable_token_ids()->Add(answer.ids().begin() + turn->durable, answer.ids().end());
    item.mutable_logprobs()->Add(answer.logprobs().begin() + turn->durable, answer.logprobs().end());
    if (answer.finished()) {
      item.set_finish_reason(answer.reason());
      if (answer.stop_token_id().has_value()) item.set_stop_token_id(*answer.stop_token_id());
      item.set_stop_string(answer.stop_string());
      if (!turn->error.ok()) *item.mutable_error() = common::ToStatusProto(turn->error);
    }
    CommitResult& result = results.emplace_back();
    result.turn_id = id;
    result.tokens = answer.size() - turn->durable;
    result.finish = answer.finished();
    turn_tokens.push_back(turn->durable);
    turn->committing = true;
  }
  if (results.empty()) return;
  commit_ = std::make_shared<Commit>();
  commit_->request = std::move(request);
  commit_->results = std::move(results);
  commit_->turn_tokens = std::move(turn_tokens);
  commit_->begin = world_->CallClock();
  commit_->deadline = StoreDeadline();
  TryCommit();
}

void TurnCore::TryCommit() {
  commit_->running = true;
  const auto work = [this, commit = commit_] { AttemptCommit(*commit); };
  const auto then = [this, commit = commit_] { OnCommitAttempt(commit); };
  // One at a time, so its queue has room.
  world_->Run(World::Queue::kCommit, [this, work, then] {
    work();
    world_->Post(then);
  });
}

void TurnCore::AttemptCommit(Commit& commit) {
  const absl::StatusOr<v1::AppendTokensResponse> response =
      catalog_->AppendTokens(commit.request, std::min(commit.deadline, world_->CallClock() + kCommitAttempt));
  commit.status = response.status();
  if (!response.ok()) return;
  if (response->statuses_size() != commit.request.items_size()) {
    commit.status = absl::InternalError("AppendTokens: as many statuses as items expected");
    return;
  }
  for (int i = 0; i < commit.request.items_size(); ++i) {
    absl::Status& status = commit.results[i].status;
    status = common::FromStatusProto(response->statuses(i));
    // An attempt before may have gone through although its answer was lost.
    if (commit.attempts == 0 || status.ok()) continue;
    const absl::StatusOr<bool> appended = WasAppended(commit.request.items(i), commit.turn_tokens[i]);
    if (!appended.ok() && MayHaveHappened(appended.status())) {
      commit.status = appended.status();  // Nobody knows; the store's refusal would be a guess.
      return;
    }
    if (appended.ok() && *appended) status = absl::OkStatus();
  }
}

void TurnCore::OnCommitAttempt(const std::shared_ptr<Commit>& commit) {
  commit->running = false;
  const absl::Duration backoff = std::min(kMinCommitBackoff * (1 << std::min(commit->attempts, 10)), kMaxCommitBackoff);
  if (MayHaveHappened(commit->status) && world_->CallClock() + backoff < commit->deadline && !stopping_) {
    ++commit->attempts;
    commit->not_before = world_->CallClock() + backoff;
    return;
  }
  if (!commit->status.ok()) {
    for (CommitResult& result : commit->results) result.status = commit->status;
  }
  commit_ = nullptr;
  OnCommitted(commit->results, world_->CallClock() - commit->begin);
}

absl::StatusOr<bool> TurnCore::WasAppended(const v1::AppendItem& item, uint64_t turn_tokens) {
  v1::FindTurnRequest find;
  find.set_session_id(item.lease().session_id());
  find.set_request_id(item.request_id());
  const absl::StatusOr<v1::FindTurnResponse> found = catalog_->FindTurn(find, StoreDeadline());
  if (!found.ok()) return found.status();
  if (!found->has_turn()) return false;
  const bool ended = found->turn().state() == v1::TURN_STATE_FINISHED;
  const bool wants_end = item.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
  return found->turn().token_count() == turn_tokens + item.token_ids_size() && ended == wants_end;
}

void TurnCore::OnCommitted(const std::vector<CommitResult>& results, absl::Duration took) {
  metrics_->store_commit_seconds.Observe(absl::ToDoubleSeconds(took));
  for (const CommitResult& result : results) {
    const auto it = running_.find(result.turn_id);
    if (it == running_.end()) continue;
    const TurnPtr turn = it->second;
    turn->committing = false;
    Session& session = *turn->session;  // Kept while its turn is committing.
    if (result.status.ok()) {
      turn->durable += result.tokens;
      if (result.finish) {
        turn->finish_durable = true;
        metrics_->CountFinish(turn->answer->reason());
      }
      session.durable_length = turn->begin + turn->prompt.size() + turn->durable;
      continue;
    }
    common::LogWarning("commit_failed", {{"status", result.status}});
    // What is not in the log has never been: neither slot nor snapshot may hold it.
    turn->abandoned = true;
    session.stale = true;
    Fail(*turn, StoreError(result.status));
    if (turn->sequence != 0) RemoveSequence(*turn);
    DropWarm(session.id);
    std::vector<std::string> beyond;
    for (const auto& [id, save] : saves_) {
      if (save.session_id == session.id && save.position > session.durable_length) beyond.push_back(id);
    }
    for (const std::string& id : beyond) EndSave(id, absl::AbortedError("its tokens are not in the log"));
  }
}

}  // namespace rwkv::router
