// What the kinds of calls ask of the workers, and what they make of the answers, one at a time.
#include "services/router/core/call_kinds.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/turn.h"
#include "services/router/testing/fake_cluster.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using What = CallKind::Next::What;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

// A call of some kind in a slot, and what the core knows of it.
template <typename Kind>
struct Running {
  explicit Running(std::unique_ptr<Kind> made) : kind(made.get()) { turn.kind = std::move(made); }

  // The input, of which the last token is only scored.
  void TakeTokens(int count) {
    for (int i = 0; i < count; ++i) turn.prompt.push_back(1000 + i);
    kind->TakeLast(&turn.prompt);
  }
  CallKind::Next Advance(bool has_room = true) {
    const CallKind::Next next =
        kind->Advance(turn, turn.done_end == turn.fed_end, [has_room](size_t) { return has_room; });
    if (next.what == What::kFeed) turn.fed_end += next.tokens;
    return next;
  }
  v1::StepEntry Ask(uint64_t position, uint64_t end) const {
    v1::StepEntry entry;
    kind->Ask(turn, position, end, &entry);
    return entry;
  }
  // The tokens up to `end` come back, with a score each.
  void Come(uint64_t end, int scores) {
    v1::EntryResult result;
    for (int i = 0; i < scores; ++i) result.add_scores(-static_cast<float>(end - scores + i));
    turn.done_end = end;
    kind->OnResult(turn, result);
  }

  Turn turn;
  Kind* const kind;
};

std::shared_ptr<const ServingModel> Model(uint32_t vocab_size) {
  auto model = std::make_shared<ServingModel>();
  model->info.set_vocab_size(vocab_size);
  return model;
}

TEST(CallKindsTest, AScoreIsAnsweredOnceAllOfItCameBack) {
  absl::StatusOr<v1::ScoreResponse> answer = absl::UnknownError("none");
  int answers = 0;
  Running<ScoreCall> score(std::make_unique<ScoreCall>([&](absl::StatusOr<v1::ScoreResponse> got) {
    answer = std::move(got);
    ++answers;
  }));
  score.TakeTokens(4);
  EXPECT_EQ(score.kind->FeedAtOnce(score.turn), 3);
  score.turn.fed_end = 3;
  EXPECT_THAT(score.Ask(0, 2).score_token_ids(), ElementsAre(1001, 1002));
  EXPECT_THAT(score.Ask(2, 3).score_token_ids(), ElementsAre(1003));
  score.Come(2, 2);
  EXPECT_EQ(score.Advance().what, What::kWait);
  // It lost its slot, and begins again.
  score.kind->LeftSlot();
  score.Come(2, 2);
  score.Come(3, 1);
  EXPECT_EQ(score.Advance().what, What::kEnd);
  ASSERT_THAT(answer, IsOk());
  EXPECT_THAT(answer->token_ids(), ElementsAre(1000, 1001, 1002, 1003));
  EXPECT_THAT(answer->logprobs(), ElementsAre(0, -1, -2));
  EXPECT_FALSE(score.kind->IsOpen());
  score.kind->Close(absl::CancelledError());
  EXPECT_EQ(answers, 1);
}

TEST(CallKindsTest, ScoresThatDoNotComeAreAnError) {
  Running<ScoreCall> score(std::make_unique<ScoreCall>([](const absl::StatusOr<v1::ScoreResponse>&) {}));
  score.TakeTokens(4);
  score.turn.fed_end = 3;
  score.Come(3, 2);
  EXPECT_THAT(score.Advance().status, StatusIs(absl::StatusCode::kInternal));

  const auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  Running<DocumentCall> document(std::make_unique<DocumentCall>(stream));
  document.TakeTokens(4);
  document.turn.fed_end = 3;
  document.Come(3, 2);
  EXPECT_THAT(document.Advance().status, StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(stream->received(), IsEmpty());
}

TEST(CallKindsTest, ADocumentIsFedInWindowsAndSentAsItComes) {
  const auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  Running<DocumentCall> document(std::make_unique<DocumentCall>(stream));
  document.TakeTokens(40001);
  EXPECT_TRUE(document.kind->may_yield());
  EXPECT_EQ(document.kind->FeedAtOnce(document.turn), 0);
  EXPECT_EQ(document.Advance().tokens, 16384);
  document.Come(8191, 8191);
  EXPECT_EQ(document.Advance(/*has_room=*/false).what, What::kWait);
  EXPECT_THAT(stream->received(), IsEmpty());
  EXPECT_FALSE(document.kind->IsPassedOn(document.turn));
  // 8,193 are ahead of the client, then 8,192.
  EXPECT_EQ(document.Advance().what, What::kWait);
  EXPECT_TRUE(document.kind->IsPassedOn(document.turn));
  document.Come(8192, 1);
  EXPECT_EQ(document.Advance().tokens, 8192);
  ASSERT_EQ(stream->received().size(), 2);
  EXPECT_EQ(stream->received()[0].token_count(), 40001);
  EXPECT_EQ(stream->received()[0].first(), 1);
  EXPECT_EQ(stream->received()[1].first(), 8192);
  EXPECT_THAT(stream->received()[1].token_ids(), ElementsAre(1000 + 8192));
  EXPECT_THAT(stream->received()[1].logprobs(), ElementsAre(-8191));
  EXPECT_FALSE(stream->closed());
}

TEST(CallKindsTest, ADocumentThatLostItsSlotIsFedWhatTheClientHasAndNotAskedForItAgain) {
  const auto stream = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  Running<DocumentCall> document(std::make_unique<DocumentCall>(stream));
  document.TakeTokens(21);
  EXPECT_EQ(document.Advance().tokens, 20);
  document.Come(5, 5);
  document.Advance();
  document.Come(9, 4);  // Came back, and is not sent.
  document.kind->LeftSlot();
  EXPECT_EQ(document.kind->FeedAtOnce(document.turn), 5);
  document.turn.done_end = 0;
  document.turn.fed_end = 5;
  EXPECT_EQ(document.Advance().what, What::kWait);  // It is not where it was.
  EXPECT_THAT(document.Ask(0, 5).score_token_ids(), IsEmpty());
  document.Come(5, 0);
  EXPECT_EQ(document.Advance().tokens, 15);
  EXPECT_EQ(document.Ask(5, 20).score_token_ids_size(), 15);
  EXPECT_EQ(document.Ask(5, 20).score_token_ids(14), 1020);
  document.Come(20, 15);
  EXPECT_EQ(document.Advance().what, What::kEnd);
  ASSERT_EQ(stream->received().size(), 2);
  EXPECT_EQ(stream->received()[1].first(), 6);
  EXPECT_EQ(stream->received()[1].logprobs_size(), 15);
}

TEST(CallKindsTest, LogitsComeInWindowsOfBytes) {
  const auto stream = std::make_shared<FakeStream<v1::LogitsResponse>>();
  Running<LogitsCall> logits(std::make_unique<LogitsCall>(stream));
  logits.turn.model = Model(1 << 20);  // 4 MiB a row.
  logits.turn.prompt = {1, 2, 3};
  const auto come = [&](uint64_t first, uint32_t rows) {
    v1::LogitsRows message;
    message.set_first_position(first);
    message.set_rows(rows);
    logits.kind->OnLogits(logits.turn, message);
  };
  EXPECT_EQ(logits.kind->FeedAtOnce(logits.turn), 0);
  EXPECT_EQ(logits.Advance(/*has_room=*/false).what, What::kWait);
  EXPECT_EQ(logits.Advance().tokens, 2);
  EXPECT_TRUE(logits.Ask(0, 2).logits());
  logits.turn.done_end = 2;
  come(0, 1);
  EXPECT_FALSE(logits.kind->IsPassedOn(logits.turn));
  EXPECT_EQ(logits.Advance().what, What::kWait);
  come(0, 1);  // Of a slot that was lost: the client has it.
  come(1, 1);
  EXPECT_TRUE(logits.kind->IsPassedOn(logits.turn));
  EXPECT_FALSE(logits.Ask(0, 2).logits());
  EXPECT_EQ(logits.kind->FeedAtOnce(logits.turn), 2);
  EXPECT_EQ(logits.Advance().tokens, 1);
  logits.turn.done_end = 3;
  come(2, 1);
  EXPECT_EQ(logits.Advance().what, What::kEnd);
  ASSERT_EQ(stream->received().size(), 3);
  EXPECT_EQ(stream->received()[2].first_row(), 2);
  EXPECT_EQ(stream->received()[2].vocab_size(), 1 << 20);
}

TEST(CallKindsTest, AnEmbeddingIsThatAfterTheLastToken) {
  absl::StatusOr<v1::EmbedResponse> answer = absl::UnknownError("none");
  v1::EmbedRequest request;
  request.set_source(v1::EMBED_SOURCE_STATE);
  Running<EmbedCall> embed(
      std::make_unique<EmbedCall>(request, [&](absl::StatusOr<v1::EmbedResponse> got) { answer = std::move(got); }));
  embed.turn.prompt = {1, 2, 3};
  EXPECT_THAT(embed.kind->CheckLayout({}), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_FALSE(embed.Ask(0, 2).wkv_state());
  EXPECT_TRUE(embed.Ask(2, 3).wkv_state());
  embed.turn.fed_end = 3;
  const auto come = [&](uint64_t end, const std::string& bytes) {
    v1::EntryResult result;
    result.set_wkv_state(bytes);
    embed.turn.done_end = end;
    embed.kind->OnResult(embed.turn, result);
  };
  come(2, "abcdefgh");
  EXPECT_EQ(embed.Advance().what, What::kWait);
  come(3, std::string(4, '\0'));
  EXPECT_EQ(embed.Advance().what, What::kEnd);
  ASSERT_THAT(answer, IsOk());
  EXPECT_THAT(answer->values(), ElementsAre(0));
  EXPECT_EQ(answer->prompt_tokens(), 3);

  Running<EmbedCall> without(std::make_unique<EmbedCall>(request, [](const absl::StatusOr<v1::EmbedResponse>&) {}));
  EXPECT_THAT(without.Advance().status, StatusIs(absl::StatusCode::kInternal));
}

TEST(CallKindsTest, AnExportSavesOnceForEachSlotItHas) {
  absl::StatusOr<ExportedState> answer = absl::UnknownError("none");
  Running<ExportCall> exported(
      std::make_unique<ExportCall>([&](absl::StatusOr<ExportedState> got) { answer = std::move(got); }));
  exported.turn.model = Model(10);
  exported.turn.begin = 7;
  exported.turn.fed_end = exported.turn.done_end = 6;
  EXPECT_EQ(exported.Advance().what, What::kWait);
  exported.turn.fed_end = 7;
  EXPECT_EQ(exported.Advance().what, What::kWait);  // It is on its way.
  exported.turn.done_end = 7;
  EXPECT_EQ(exported.Advance().what, What::kSave);
  exported.kind->OnSaveBegan("one");
  EXPECT_EQ(exported.Advance().what, What::kWait);
  EXPECT_TRUE(exported.kind->AwaitsSave("one"));
  exported.kind->LeftSlot();
  EXPECT_FALSE(exported.kind->AwaitsSave("one"));
  EXPECT_EQ(exported.Advance().what, What::kSave);
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id("two");
  exported.kind->OnSnapshot(exported.turn, manifest);
  ASSERT_THAT(answer, IsOk());
  EXPECT_EQ(answer->manifest.snapshot_id(), "two");
  EXPECT_FALSE(exported.kind->IsOpen());
}

TEST(CallKindsTest, WhoWaitsForAnAnswerGetsTheErrorInstead) {
  absl::Status score, exclusive;
  ScoreCall(([&](const absl::StatusOr<v1::ScoreResponse>& got) {
    score = got.status();
  })).Close(absl::UnavailableError("gone"));
  EXPECT_THAT(score, StatusIs(absl::StatusCode::kUnavailable));
  ExclusiveCall held([](const v1::AcquireLeaseResponse&) { return absl::OkStatus(); }, /*deletes=*/true,
                     [&](absl::Status got) { exclusive = std::move(got); });
  EXPECT_FALSE(held.takes_slot());
  EXPECT_TRUE(held.deletes());
  held.Close(absl::AbortedError("busy"));
  EXPECT_THAT(exclusive, StatusIs(absl::StatusCode::kAborted));
  const auto stream = std::make_shared<GenerateStream>();
  GenerateCall generate(stream);
  EXPECT_EQ(generate.stream(), stream.get());
  generate.Close(absl::OkStatus());
  EXPECT_TRUE(stream->closed());
  EXPECT_EQ(generate.stream(), nullptr);
}

}  // namespace
}  // namespace rwkv::router
