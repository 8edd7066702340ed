#include "services/router/core/log_writer.h"

#include <algorithm>
#include <utility>

#include "services/common/grpc_status.h"

namespace rwkv::router {
namespace {

constexpr size_t kMaxItems = 1024;
constexpr absl::Duration kMinBackoff = absl::Milliseconds(10);
constexpr absl::Duration kMaxBackoff = absl::Milliseconds(500);
constexpr absl::Duration kAttempt = absl::Seconds(5);

}  // namespace

bool MayHaveHappened(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsUnknown(status);
}

bool LogWriter::Batch::full() const { return items.size() >= kMaxItems; }

void LogWriter::Batch::Add(const Turn& turn) {
  const Answer& answer = *turn.answer;
  v1::AppendItem& append = *request.add_items();
  *append.mutable_lease() = turn.session->lease;
  append.set_request_id(turn.request_id);
  append.set_expected_length(turn.begin + turn.prompt.size() + turn.durable);
  append.mutable_token_ids()->Add(answer.ids().begin() + turn.durable, answer.ids().end());
  append.mutable_logprobs()->Add(answer.logprobs().begin() + turn.durable, answer.logprobs().end());
  if (answer.finished()) {
    append.set_finish_reason(answer.reason());
    if (answer.stop_token_id().has_value()) append.set_stop_token_id(*answer.stop_token_id());
    append.set_stop_string(answer.stop_string());
    if (!turn.error.ok()) *append.mutable_error() = common::ToStatusProto(turn.error);
  }
  Item& item = items.emplace_back();
  item.turn_id = turn.id;
  item.tokens = answer.size() - turn.durable;
  item.finish = answer.finished();
  turn_tokens.push_back(turn.durable);
}

LogWriter::LogWriter(World* world, state_store::CatalogClient* catalog, Done done)
    : world_(world), catalog_(catalog), done_(std::move(done)) {}

void LogWriter::Begin(Batch batch, absl::Time deadline) {
  commit_ = std::make_shared<Commit>();
  commit_->batch = std::move(batch);
  commit_->begin = world_->CallClock();
  commit_->deadline = deadline;
  Try();
}

void LogWriter::Sweep(bool stopping) {
  stopping_ = stopping;
  if (commit_ == nullptr || commit_->running) return;
  if (world_->CallClock() >= commit_->not_before || stopping) Try();
}

void LogWriter::Try() {
  commit_->running = true;
  // One at a time, so its queue has room.
  world_->Run(World::Queue::kCommit, [this, commit = commit_] {
    Attempt(*commit);
    world_->Post([this, commit] { OnAttempt(commit); });
  });
}

void LogWriter::Attempt(Commit& commit) {
  Batch& batch = commit.batch;
  const absl::StatusOr<v1::AppendTokensResponse> response =
      catalog_->AppendTokens(batch.request, std::min(commit.deadline, world_->CallClock() + kAttempt));
  commit.status = response.status();
  if (!response.ok()) return;
  if (response->statuses_size() != batch.request.items_size()) {
    commit.status = absl::InternalError("AppendTokens: as many statuses as items expected");
    return;
  }
  for (int i = 0; i < batch.request.items_size(); ++i) {
    absl::Status& status = batch.items[i].status;
    status = common::FromStatusProto(response->statuses(i));
    // An attempt before may have gone through although its answer was lost.
    if (commit.attempts == 0 || status.ok()) continue;
    const absl::StatusOr<bool> appended = WasAppended(batch.request.items(i), batch.turn_tokens[i]);
    if (!appended.ok() && MayHaveHappened(appended.status())) {
      commit.status = appended.status();  // Nobody knows; the store's refusal would be a guess.
      return;
    }
    if (appended.ok() && *appended) status = absl::OkStatus();
  }
}

absl::StatusOr<bool> LogWriter::WasAppended(const v1::AppendItem& item, uint64_t turn_tokens) {
  v1::FindTurnRequest find;
  find.set_session_id(item.lease().session_id());
  find.set_request_id(item.request_id());
  const absl::StatusOr<v1::FindTurnResponse> found = catalog_->FindTurn(find, world_->CallClock() + kAttempt);
  if (!found.ok()) return found.status();
  if (!found->has_turn()) return false;
  const bool ended = found->turn().state() == v1::TURN_STATE_FINISHED;
  const bool wants_end = item.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
  return found->turn().token_count() == turn_tokens + item.token_ids_size() && ended == wants_end;
}

void LogWriter::OnAttempt(const std::shared_ptr<Commit>& commit) {
  commit->running = false;
  const absl::Duration backoff = std::min(kMinBackoff * (1 << std::min(commit->attempts, 10)), kMaxBackoff);
  if (MayHaveHappened(commit->status) && world_->CallClock() + backoff < commit->deadline && !stopping_) {
    ++commit->attempts;
    commit->not_before = world_->CallClock() + backoff;
    return;
  }
  if (!commit->status.ok()) {
    for (Item& item : commit->batch.items) item.status = commit->status;
  }
  commit_ = nullptr;
  done_(commit->batch.items, world_->CallClock() - commit->begin);
}

}  // namespace rwkv::router
