#include "services/router/core/call_kinds.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "services/router/core/embedding.h"
#include "services/router/core/turn.h"

namespace rwkv::router {
namespace {

using What = CallKind::Next::What;

// Logits that may be on their way to one client, of all steps together.
constexpr int64_t kLogitsWindowBytes = 8 << 20;
// Tokens of a document that may be on their way, or scored and not sent.
constexpr uint64_t kDocumentWindow = 16384;

template <typename Response>
void CloseStream(std::shared_ptr<ResponseStream<Response>>& stream, const absl::Status& status) {
  if (auto open = std::exchange(stream, nullptr)) open->Close(status);
}

}  // namespace

void GenerateCall::Close(const absl::Status& status) { CloseStream(stream_, status); }

void ScoringCall::OnResult(const Turn& /*turn*/, const v1::EntryResult& result) {
  scores_.insert(scores_.end(), result.scores().begin(), result.scores().end());
}

void ScoringCall::AskForScores(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const {
  for (; position < end; ++position) entry->add_score_token_ids(Target(turn, position));
}

uint32_t ScoringCall::Target(const Turn& turn, uint64_t position) const {
  return position + 1 < turn.prompt.size() ? turn.prompt[position + 1] : last_;
}

void ScoreCall::Ask(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const {
  AskForScores(turn, position, end, entry);
}

CallKind::Next ScoreCall::Advance(const Turn& turn, bool idle, const HasRoom& /*has_room*/) {
  if (!idle || turn.done_end < turn.KnownEnd()) return {};
  if (scores_.size() != turn.prompt.size()) return {What::kEnd, 0, Missing(turn, scores_.size())};
  Answer(turn);
  return {What::kEnd};
}

absl::Status ScoringCall::Missing(const Turn& turn, size_t scores) {
  return absl::InternalError(absl::StrCat("the pipeline sent ", scores, " scores of ", turn.done_end, " tokens"));
}

void ScoreCall::Answer(const Turn& turn) {
  v1::ScoreResponse response;
  response.mutable_token_ids()->Add(turn.prompt.begin(), turn.prompt.end());
  response.add_token_ids(Target(turn, turn.prompt.size()));
  response.mutable_logprobs()->Add(scores_.begin(), scores_.end());
  answer_.Tell(std::move(response));
}

void DocumentCall::Close(const absl::Status& status) { CloseStream(stream_, status); }

void DocumentCall::Ask(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const {
  if (position >= sent_) AskForScores(turn, position, end, entry);
}

CallKind::Next DocumentCall::Advance(const Turn& turn, bool /*idle*/, const HasRoom& has_room) {
  if (stream_ == nullptr) return {};
  if (turn.done_end > sent_ + scores_.size()) return {What::kEnd, 0, Missing(turn, sent_ + scores_.size())};
  if (!scores_.empty() && has_room(stream_->queued())) Send(turn);
  if (sent_ == turn.KnownEnd()) return {What::kEnd};
  if (turn.fed_end == turn.KnownEnd() || turn.done_end < sent_) return {};
  const uint64_t ahead = turn.fed_end - sent_;
  if (ahead > kDocumentWindow / 2) return {};
  return {What::kFeed, std::min(kDocumentWindow - ahead, turn.KnownEnd() - turn.fed_end)};
}

void DocumentCall::Send(const Turn& turn) {
  v1::ScoreDocumentResponse response;
  response.set_token_count(turn.prompt.size() + 1);
  response.set_first(sent_ + 1);
  for (size_t i = 0; i < scores_.size(); ++i) response.add_token_ids(Target(turn, sent_ + i));
  response.mutable_logprobs()->Add(scores_.begin(), scores_.end());
  sent_ += scores_.size();
  scores_.clear();
  stream_->Send(std::move(response));
}

void LogitsCall::Close(const absl::Status& status) { CloseStream(stream_, status); }

void LogitsCall::Ask(const Turn& /*turn*/, uint64_t position, uint64_t /*end*/, v1::StepEntry* entry) const {
  entry->set_logits(position >= rows_sent_);
}

void LogitsCall::OnLogits(const Turn& turn, const v1::LogitsRows& rows) {
  if (stream_ == nullptr || rows.first_position() != rows_sent_) return;
  v1::LogitsResponse response;
  response.set_first_row(rows.first_position());
  response.set_rows(rows.rows());
  response.set_vocab_size(turn.model->info.vocab_size());
  response.set_logits(rows.logits());
  rows_sent_ += rows.rows();
  stream_->Send(std::move(response));
}

CallKind::Next LogitsCall::Advance(const Turn& turn, bool idle, const HasRoom& has_room) {
  if (!idle || rows_sent_ < turn.fed_end || stream_ == nullptr) return {};
  if (turn.fed_end == turn.KnownEnd()) return {What::kEnd};
  if (!has_room(stream_->queued())) return {};
  const int64_t row_bytes = static_cast<int64_t>(turn.model->info.vocab_size()) * sizeof(float);
  const uint64_t window = std::max<int64_t>(1, kLogitsWindowBytes / row_bytes);
  return {What::kFeed, std::min(window, turn.KnownEnd() - turn.fed_end)};
}

bool LogitsCall::IsPassedOn(const Turn& turn) const { return rows_sent_ >= turn.done_end; }

EmbedCall::EmbedCall(const v1::EmbedRequest& request, PendingAnswer<v1::EmbedResponse>::Done done)
    : answer_(std::move(done)) {
  request_.set_source(request.source());
  request_.set_normalize(request.normalize());
}

absl::Status EmbedCall::CheckLayout(const std::vector<v1::StateTensor>& layout) const {
  return CheckEmbedSource(request_.source(), layout);
}

void EmbedCall::Ask(const Turn& turn, uint64_t /*position*/, uint64_t end, v1::StepEntry* entry) const {
  AskForEmbedding(request_.source(), end == turn.KnownEnd(), entry);
}

void EmbedCall::OnResult(const Turn& turn, const v1::EntryResult& result) {
  if (turn.done_end == turn.KnownEnd()) embedding_ = EmbeddingBytes(request_.source(), result);
}

CallKind::Next EmbedCall::Advance(const Turn& turn, bool idle, const HasRoom& /*has_room*/) {
  if (!idle || turn.done_end < turn.KnownEnd() || !IsOpen()) return {};
  absl::StatusOr<v1::EmbedResponse> response =
      MakeEmbedding(request_, embedding_, static_cast<uint32_t>(turn.prompt.size()));
  const absl::Status status = response.status();
  if (status.ok()) answer_.Tell(std::move(response));
  return {What::kEnd, 0, status};
}

CallKind::Next ExportCall::Advance(const Turn& turn, bool idle, const HasRoom& /*has_room*/) {
  if (!idle || turn.fed_end < turn.KnownEnd() || !snapshot_id_.empty()) return {};
  return {What::kSave};
}

void ExportCall::OnSnapshot(const Turn& turn, v1::SnapshotManifest manifest) {
  answer_.Tell(ExportedState{std::move(manifest), turn.model->state_layout});
}

void ExclusiveCall::Close(const absl::Status& status) {
  if (auto done = std::exchange(done_, nullptr)) done(status);
}

}  // namespace rwkv::router
