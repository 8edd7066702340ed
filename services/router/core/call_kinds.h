// Every kind of call. Each is told of its client when it is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/call_kind.h"
#include "services/router/core/response_stream.h"
#include "services/router/core/turn_options.h"

namespace rwkv::router {

// What the client of a call that is answered once waits with.
template <typename Response>
class PendingAnswer {
 public:
  using Done = std::function<void(absl::StatusOr<Response>)>;

  explicit PendingAnswer(Done done) : done_(std::move(done)) {}
  bool IsOpen() const { return done_ != nullptr; }
  // The first counts.
  void Tell(absl::StatusOr<Response> answer) {
    if (auto done = std::exchange(done_, nullptr)) done(std::move(answer));
  }

 private:
  Done done_;
};

// Continues an input, token by token. What comes next is the core's to say, since it stands in the session's log.
class GenerateCall final : public CallKind {
 public:
  explicit GenerateCall(std::shared_ptr<ResponseStream<v1::GenerateResponse>> stream) : stream_(std::move(stream)) {}

  bool generates() const override { return true; }
  bool may_yield() const override { return true; }
  bool IsOpen() const override { return stream_ != nullptr; }
  void Close(const absl::Status& status) override;
  ResponseStream<v1::GenerateResponse>* stream() override { return stream_.get(); }

 private:
  std::shared_ptr<ResponseStream<v1::GenerateResponse>> stream_;
};

// Scores the tokens of an input. Its turn's prompt is without the last of them, which is only scored.
class ScoringCall : public CallKind {
 public:
  // Of an input of one token at least. To be called before anything else.
  void TakeLast(std::vector<uint32_t>* tokens) {
    last_ = tokens->back();
    tokens->pop_back();
  }
  void OnResult(const Turn& turn, const v1::EntryResult& result) override;
  void LeftSlot() override { scores_.clear(); }

 protected:
  void AskForScores(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const;
  // The token after the one at `position`.
  uint32_t Target(const Turn& turn, uint64_t position) const;
  static absl::Status Missing(const Turn& turn, size_t scores);

  std::vector<float> scores_;  // Those that came back and are not sent.

 private:
  uint32_t last_ = 0;
};

class ScoreCall final : public ScoringCall {
 public:
  explicit ScoreCall(PendingAnswer<v1::ScoreResponse>::Done done) : answer_(std::move(done)) {}

  bool IsOpen() const override { return answer_.IsOpen(); }
  void Close(const absl::Status& status) override { answer_.Tell(status); }
  void Ask(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const override;
  Next Advance(const Turn& turn, bool idle, const HasRoom& has_room) override;
  void Answer(const Turn& turn);

 private:
  PendingAnswer<v1::ScoreResponse> answer_;
};

// A long input, whose scores are streamed.
class DocumentCall final : public ScoringCall {
 public:
  explicit DocumentCall(std::shared_ptr<ResponseStream<v1::ScoreDocumentResponse>> stream)
      : stream_(std::move(stream)) {}

  bool may_yield() const override { return true; }
  bool IsOpen() const override { return stream_ != nullptr; }
  void Close(const absl::Status& status) override;
  uint64_t FeedAtOnce(const Turn& /*turn*/) const override { return sent_; }
  void Ask(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const override;
  Next Advance(const Turn& turn, bool idle, const HasRoom& has_room) override;
  bool IsPassedOn(const Turn& /*turn*/) const override { return scores_.empty(); }
  // The first message, or the next.
  void Send(const Turn& turn);

 private:
  std::shared_ptr<ResponseStream<v1::ScoreDocumentResponse>> stream_;
  uint64_t sent_ = 0;
};

class LogitsCall final : public CallKind {
 public:
  explicit LogitsCall(std::shared_ptr<ResponseStream<v1::LogitsResponse>> stream) : stream_(std::move(stream)) {}

  bool may_yield() const override { return true; }
  bool IsOpen() const override { return stream_ != nullptr; }
  void Close(const absl::Status& status) override;
  uint64_t FeedAtOnce(const Turn& /*turn*/) const override { return rows_sent_; }
  void Ask(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const override;
  void OnLogits(const Turn& turn, const v1::LogitsRows& rows) override;
  Next Advance(const Turn& turn, bool idle, const HasRoom& has_room) override;
  bool IsPassedOn(const Turn& turn) const override;

 private:
  std::shared_ptr<ResponseStream<v1::LogitsResponse>> stream_;
  uint64_t rows_sent_ = 0;
};

class EmbedCall final : public CallKind {
 public:
  // `request`: its source is known; its input is not looked at.
  EmbedCall(const v1::EmbedRequest& request, PendingAnswer<v1::EmbedResponse>::Done done);

  bool IsOpen() const override { return answer_.IsOpen(); }
  void Close(const absl::Status& status) override { answer_.Tell(status); }
  absl::Status CheckLayout(const std::vector<v1::StateTensor>& layout) const override;
  void Ask(const Turn& turn, uint64_t position, uint64_t end, v1::StepEntry* entry) const override;
  void OnResult(const Turn& turn, const v1::EntryResult& result) override;
  Next Advance(const Turn& turn, bool idle, const HasRoom& has_room) override;

 private:
  v1::EmbedRequest request_;
  PendingAnswer<v1::EmbedResponse> answer_;
  std::string embedding_;  // fp32, as it came; empty until then.
};

// Sees to it that there is a snapshot at the end of a session's log: feeds what the log has beyond the newest one, and
// saves.
class ExportCall final : public CallKind {
 public:
  explicit ExportCall(PendingAnswer<ExportedState>::Done done) : answer_(std::move(done)) {}

  bool wants_snapshot() const override { return true; }
  bool IsOpen() const override { return answer_.IsOpen(); }
  void Close(const absl::Status& status) override { answer_.Tell(status); }
  Next Advance(const Turn& turn, bool idle, const HasRoom& has_room) override;
  void LeftSlot() override { snapshot_id_.clear(); }
  void OnSaveBegan(const std::string& snapshot_id) override { snapshot_id_ = snapshot_id; }
  bool AwaitsSave(const std::string& snapshot_id) const override { return snapshot_id_ == snapshot_id; }
  void OnSnapshot(const Turn& turn, v1::SnapshotManifest manifest) override;

 private:
  PendingAnswer<ExportedState> answer_;
  std::string snapshot_id_;  // While it is being saved.
};

// Changes a session other than by generating.
class ExclusiveCall final : public CallKind {
 public:
  ExclusiveCall(ExclusiveJob job, bool deletes, std::function<void(absl::Status)> done)
      : job_(std::move(job)), deletes_(deletes), done_(std::move(done)) {}

  bool takes_slot() const override { return false; }
  bool IsOpen() const override { return done_ != nullptr; }
  void Close(const absl::Status& status) override;
  ExclusiveJob job() const override { return job_; }
  bool deletes() const override { return deletes_; }

 private:
  const ExclusiveJob job_;
  const bool deletes_;
  std::function<void(absl::Status)> done_;
};

}  // namespace rwkv::router
