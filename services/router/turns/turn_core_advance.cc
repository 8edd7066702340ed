// What a running sequence does next, for each kind of call.
#include <algorithm>
#include <utility>

#include "services/router/turns/embedding.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Kind = Turn::Kind;

// Logits that may be on their way to one client, of all steps together.
constexpr int64_t kLogitsWindowBytes = 8 << 20;
// Tokens of a document that may be on their way, or scored and not sent.
constexpr uint64_t kDocumentWindow = 16384;

}  // namespace

void TurnCore::Advance(Turn& turn) {
  const bool idle = turn.done_end == turn.fed_end && !turn.tail_pending;  // Everything fed has come back.
  if (turn.yielding && !turn.decided()) {
    // What came back is with the client, or can be sent at any time.
    const bool passed_on = turn.kind == Kind::kDocument ? turn.scores.empty() : turn.logits_received >= turn.done_end;
    if (idle && (turn.kind == Kind::kGenerate || passed_on)) return Yield(running_.at(turn.id));
    if (turn.kind != Kind::kDocument) return;
  }
  switch (turn.kind) {
    case Kind::kGenerate:
      return AdvanceGenerate(turn, idle);
    case Kind::kDocument:
      return AdvanceDocument(turn);
    case Kind::kScore:
      return idle ? AdvanceScore(turn) : void();
    case Kind::kLogits:
      return idle ? AdvanceLogits(turn) : void();
    case Kind::kEmbed:
      return idle ? AdvanceEmbed(turn) : void();
    case Kind::kExport:
      return idle ? AdvanceExport(turn) : void();
    case Kind::kExclusive:
      return;
  }
}

bool TurnCore::Lagging(const Turn& turn) const {
  const uint64_t size = turn.answer->size();
  if (turn.HasLog() && size - turn.durable >= static_cast<uint64_t>(options_.max_uncommitted_tokens)) return true;
  return (turn.HasLog() ? turn.durable : size) >= turn.sent + options_.max_stream_messages;
}

void TurnCore::AdvanceGenerate(Turn& turn, bool idle) {
  if (!turn.decided() && !turn.stopped && FeedPastPrefix(turn)) return;
  if (turn.spec.max_tokens() == 0 && idle && turn.fed_end == turn.FeedEnd() && !turn.decided()) {
    turn.answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
    if (!turn.HasLog()) metrics_->CountFinish(v1::FINISH_REASON_LENGTH);
  }
  if (turn.decided() || turn.stopped) {
    if (!turn.HasLog() || turn.abandoned) return RemoveSequence(turn);
    if (idle) SaveAndRetire(turn);
    return;
  }
  if (turn.goes_on) return AdvanceGoing(turn, idle);
  if (turn.fed_end < turn.FeedEnd() && !turn.tail_pending && !Lagging(turn)) {
    turn.lane->scheduler.Feed(turn.sequence, static_cast<int64_t>(turn.FeedEnd() - turn.fed_end),
                              Scheduler::FeedKind::kDecode);
    turn.fed_end = turn.FeedEnd();
    return;
  }
  if (MaySave(turn) && turn.planned_end >= turn.saved_position + options_.snapshot_interval_tokens) Save(turn);
}

bool TurnCore::MaySave(const Turn& turn) const {
  return turn.HasLog() && turn.saves == 0 && saves_.size() < kSavesPerSlot * placement_.TotalSlots();
}

void TurnCore::AdvanceScore(Turn& turn) {
  if (turn.done_end < turn.KnownEnd()) return;
  if (auto done = std::exchange(turn.score_done, nullptr)) {
    v1::ScoreResponse response;
    response.mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.end());
    response.add_token_ids(turn.last_target);
    response.mutable_logprobs()->Add(turn.scores.begin(), turn.scores.end());
    done(std::move(response));
  }
  EndCall(turn, absl::OkStatus());
  RemoveSequence(turn);
}

void TurnCore::AdvanceDocument(Turn& turn) {
  if (turn.document_stream == nullptr) return;
  if (!turn.scores.empty() && HasRoom(turn, turn.document_stream->queued())) SendScores(turn);
  if (turn.stopped) return;
  if (turn.scores_sent == turn.KnownEnd()) {
    EndCall(turn, absl::OkStatus());
    return RemoveSequence(turn);
  }
  if (turn.yielding || turn.fed_end == turn.KnownEnd() || turn.done_end < turn.scores_sent) return;
  const uint64_t ahead = turn.fed_end - turn.scores_sent;
  if (ahead > kDocumentWindow / 2) return;
  const uint64_t tokens = std::min(kDocumentWindow - ahead, turn.KnownEnd() - turn.fed_end);
  turn.lane->scheduler.Feed(turn.sequence, static_cast<int64_t>(tokens), Scheduler::FeedKind::kPrefill);
  turn.fed_end += tokens;
}

void TurnCore::AdvanceLogits(Turn& turn) {
  if (turn.logits_received < turn.fed_end || turn.logits_stream == nullptr) return;
  if (turn.fed_end == turn.KnownEnd()) {
    EndCall(turn, absl::OkStatus());
    return RemoveSequence(turn);
  }
  if (!HasRoom(turn, turn.logits_stream->queued())) return;
  const int64_t row_bytes = static_cast<int64_t>(turn.model->info.vocab_size()) * sizeof(float);
  const uint64_t window = std::max<int64_t>(1, kLogitsWindowBytes / row_bytes);
  const uint64_t rows = std::min(window, turn.KnownEnd() - turn.fed_end);
  turn.lane->scheduler.Feed(turn.sequence, static_cast<int64_t>(rows), Scheduler::FeedKind::kPrefill);
  turn.fed_end += rows;
}

void TurnCore::AdvanceEmbed(Turn& turn) {
  if (turn.done_end < turn.KnownEnd() || turn.embed_done == nullptr) return;
  absl::StatusOr<v1::EmbedResponse> response =
      MakeEmbedding(turn.embed, turn.embedding, static_cast<uint32_t>(turn.prompt.size()));
  if (!response.ok()) return Fail(turn, response.status());
  std::exchange(turn.embed_done, nullptr)(*std::move(response));
  EndCall(turn, absl::OkStatus());
  RemoveSequence(turn);
}

void TurnCore::AdvanceExport(Turn& turn) {
  if (turn.fed_end < turn.KnownEnd() || !turn.export_snapshot.empty()) return;
  if (!Save(turn)) Fail(turn, absl::InternalError("the state could not be saved"));
}

}  // namespace rwkv::router
