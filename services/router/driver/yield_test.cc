// Slots are shared: long answers give theirs to those that wait and go on later, with the tokens of an undisturbed run.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/driver/yield_testing.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAreArray;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using worker::FakeModel;
using worker::FakePipeline;

TEST(YieldTest, ALongAnswerLetsAnotherIn) {
  for (const bool has_session : {false, true}) {
    SCOPED_TRACE(has_session);
    FakeCluster cluster(Slots(1), Quantum(absl::Milliseconds(5)));
    cluster.CreateSession("s");
    v1::GenerateRequest request = has_session ? SessionRequest("s", "a", Prompt(1), 2000) : Request(Prompt(1), 2000);
    request.mutable_sampling()->set_temperature(1);
    request.mutable_sampling()->set_seed(3);
    request.mutable_sampling()->set_frequency_penalty(0.5);
    const FakeCluster::Call long_call = StartAndStep(cluster, request, 3);
    const FakeCluster::Call short_call = cluster.Start(Request(Prompt(2), 5));
    ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
    ASSERT_TRUE(WaitUntil([&] {  // The long one must not be through before its quantum is used up.
      cluster.pipeline().AllowSteps(1);
      return short_call.stream->received().size() >= 1;
    }));
    EXPECT_FALSE(long_call.stream->closed());
    cluster.pipeline().ResumeSteps();
    EXPECT_THAT(cluster.Finish(short_call).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 5, kVocabulary)));
    const FakeCluster::Answer answer = cluster.Finish(long_call);
    ASSERT_THAT(answer.status, IsOk());
    EXPECT_THAT(answer.tokens, ElementsAreArray(FakeModel::Generate(Prompt(1), 2000, request.sampling(), kVocabulary)));
    EXPECT_THAT(cluster.metrics().yielded_turns.Value(), Ge(1));
    EXPECT_THAT(cluster.pipeline().stats().attaches_snapshot, Ge(1)) << "it was all fed again";
    if (has_session) EXPECT_EQ(cluster.Log("s"), Concat(Prompt(1), answer.tokens));
    EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
    EXPECT_EQ(cluster.router().counts().waiting, 0);
  }
}

TEST(YieldTest, NobodyYieldsWithoutNeed) {
  FakeCluster cluster(Slots(2), Quantum(absl::Milliseconds(1)));
  const FakeCluster::Call a = cluster.Start(Request(Prompt(1), 500));
  const FakeCluster::Call b = cluster.Start(Request(Prompt(2), 500));
  EXPECT_THAT(cluster.Finish(a).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 500, kVocabulary)));
  EXPECT_THAT(cluster.Finish(b).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(2), 500, kVocabulary)));
  EXPECT_EQ(cluster.metrics().yielded_turns.Value(), 0);
}

// 64 long answers of every kind and a 65th client: it has its first token soon, and all have the right ones, whatever
// is killed meanwhile.
TEST(YieldTest, SixtyFourLongAnswersStarveNobody) {
  for (const bool killed : {false, true}) {
    SCOPED_TRACE(killed);
    FakePipeline::Options pipeline = Slots(64);
    pipeline.vocab_size = 65536;
    FakeCluster cluster(pipeline, Quantum(absl::Milliseconds(20)));
    cluster.pipeline().PauseSteps();
    constexpr int kLong = 64;
    constexpr uint32_t kTokens = 400;
    std::vector<FakeCluster::Call> calls;
    std::vector<v1::GenerateRequest> requests;
    for (uint32_t i = 0; i < kLong; ++i) {
      v1::GenerateRequest request = Request(Prompt(i), kTokens);
      request.set_ignore_end_of_text(true);
      if (i % 2 == 0) {
        cluster.CreateSession(absl::StrCat("s", i));
        request.set_session_id(absl::StrCat("s", i));
        request.set_request_id("r");
      }
      if (i % 3 == 0) request.mutable_sampling()->set_frequency_penalty(1);
      if (i % 5 == 0) {
        request.mutable_sampling()->set_temperature(1);
        request.mutable_sampling()->set_seed(i);
      }
      if (i % 4 == 0) request.add_stop("no such text");
      requests.push_back(request);
      calls.push_back(cluster.Start(request));
    }
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return std::all_of(calls.begin(), calls.end(), [](const auto& call) { return !call.stream->received().empty(); });
    }));
    v1::GenerateRequest late = Request(Prompt(99), 3);
    late.set_ignore_end_of_text(true);
    const FakeCluster::Call last = cluster.Start(late);
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return !last.stream->received().empty();
    }));
    EXPECT_EQ(std::count_if(calls.begin(), calls.end(), [](const auto& call) { return call.stream->closed(); }), 0);
    for (int kill = 0; killed && kill < 3; ++kill) {
      const int64_t steps = cluster.pipeline().stats().steps;
      cluster.pipeline().Kill(kill % 2);
      cluster.pipeline().Restart(kill % 2);
      ASSERT_TRUE(WaitUntil([&] {
        cluster.pipeline().AllowSteps(1);
        return cluster.pipeline().stats().steps > steps + 20;
      }));
    }
    cluster.pipeline().ResumeSteps();
    EXPECT_THAT(cluster.Finish(last).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(99), 3, 65536)));
    for (uint32_t i = 0; i < kLong; ++i) {
      SCOPED_TRACE(i);
      const FakeCluster::Answer answer = cluster.Finish(calls[i]);
      ASSERT_THAT(answer.status, IsOk());
      EXPECT_THAT(answer.tokens,
                  ElementsAreArray(FakeModel::Generate(Prompt(i), kTokens, requests[i].sampling(), 65536)));
    }
  }
}

TEST(YieldTest, ThoseThatYieldedGoOnInTurn) {
  FakeCluster cluster(Slots(1), Quantum(absl::Milliseconds(5)));
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 4; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 1000)));
  // Everybody is getting on long before anybody is through.
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return std::all_of(calls.begin(), calls.end(),
                       [](const auto& call) { return call.stream->received().size() >= 8; });
  }));
  for (const FakeCluster::Call& call : calls) EXPECT_FALSE(call.stream->closed());
  EXPECT_THAT(cluster.metrics().yielded_turns.Value(), Ge(3));
  cluster.pipeline().ResumeSteps();
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_THAT(cluster.Finish(calls[i]).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(i), 1000, kVocabulary)));
  }
}

TEST(YieldTest, LongInputsAndDocumentsYieldToo) {
  FakePipeline::Options pipeline = Slots(1);
  pipeline.max_batch_tokens = 8;
  TurnManager::Options options = Quantum(absl::Milliseconds(5));
  options.allow_logits = true;
  FakeCluster cluster(pipeline, options);
  TurnManager& router = cluster.router();
  // Steps come only one by one, so that nobody is through before the quantum is used up.
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call prompt = cluster.Start(Request(Prompt(1, 5000), 3));
  auto document = std::make_shared<FakeStream<v1::ScoreDocumentResponse>>();
  router.ScoreDocument(router.NewCall(), {"", Prompt(2, 5000), ""}, document);
  v1::LogitsRequest rows;
  *rows.mutable_tokens() = Request(Prompt(3, 2000), 0).tokens();
  auto logits = std::make_shared<FakeStream<v1::LogitsResponse>>();
  router.Logits(router.NewCall(), rows, logits);
  const FakeCluster::Call short_call = cluster.Start(Request(Prompt(4), 3));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return !short_call.stream->received().empty();
  }));
  EXPECT_FALSE(prompt.stream->closed());
  EXPECT_FALSE(document->closed());
  EXPECT_FALSE(logits->closed());
  EXPECT_THAT(cluster.metrics().yielded_turns.Value(), Ge(3));
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(prompt).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1, 5000), 3, kVocabulary)));
  ASSERT_THAT(document->Wait(), IsOk());
  uint64_t scored = 1;
  for (const v1::ScoreDocumentResponse& response : document->received()) {
    ASSERT_EQ(response.first(), scored);
    for (int i = 0; i < response.token_ids_size(); ++i) {
      ASSERT_EQ(response.token_ids(i), Prompt(2, 5000)[scored + i]);
      ASSERT_EQ(response.logprobs(i), -static_cast<float>(response.token_ids(i) % 97) / 8);
    }
    scored += response.logprobs_size();
  }
  EXPECT_EQ(scored, 5000);
  ASSERT_THAT(logits->Wait(), IsOk());
  uint64_t row = 0;
  for (const v1::LogitsResponse& response : logits->received()) {
    ASSERT_EQ(response.first_row(), row);
    row += response.rows();
  }
  EXPECT_EQ(row, 2000);
}

TEST(YieldTest, AClientThatLeavesWhileItsTurnWaitsLeavesItResumable) {
  FakeCluster cluster(Slots(1), Quantum(absl::Milliseconds(5)));
  cluster.CreateSession("s");
  const v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 500);
  const FakeCluster::Call long_call = StartAndStep(cluster, request, 3);
  const FakeCluster::Call other = cluster.Start(Request(Prompt(2), 2000));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return !other.stream->received().empty();
  }));
  cluster.router().Cancel(long_call.id);
  EXPECT_THAT(long_call.stream->Wait(), StatusIs(absl::StatusCode::kCancelled));
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 1; }));
  EXPECT_EQ(cluster.router().counts().waiting, 0);
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Generate(request).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 500, kVocabulary)));
  EXPECT_THAT(cluster.Finish(other).status, IsOk());
}

TEST(YieldTest, ADrainPausesThoseThatWaitForASlotToo) {
  FakeCluster cluster(Slots(1), Quantum(absl::Milliseconds(5)));
  cluster.CreateSession("s");
  const v1::GenerateRequest request = SessionRequest("s", "a", Prompt(1), 500);
  const FakeCluster::Call long_call = StartAndStep(cluster, request, 3);
  const FakeCluster::Call other = cluster.Start(Request(Prompt(2), 100000));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return !other.stream->received().empty();
  }));
  std::thread drain([&] { cluster.router().Drain(absl::Now() + absl::Seconds(2)); });
  EXPECT_THAT(long_call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(other.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable));
  cluster.pipeline().ResumeSteps();
  drain.join();
  cluster.RestartRouter();
  EXPECT_THAT(cluster.Generate(request).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 500, kVocabulary)));
}

TEST(YieldTest, WaitingHasABound) {
  TurnManager::Options options = Quantum(absl::Hours(1));
  options.max_wait = absl::Milliseconds(50);
  FakeCluster cluster(Slots(1), options);
  cluster.CreateSession("s");
  const FakeCluster::Call running = StartAndStep(cluster, Request(Prompt(1), 100), 2);
  const absl::Status refused = cluster.Generate(SessionRequest("s", "a", Prompt(2), 5)).status;
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("waited for 50ms")));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  EXPECT_THAT(cluster.Log("s"), IsEmpty()) << "a refused call has touched the session";
  EXPECT_EQ(GetSession(cluster, "s").open_request_id(), "");
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(running).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 100, kVocabulary)));
  EXPECT_THAT(cluster.Generate(SessionRequest("s", "a", Prompt(2), 5)).status, IsOk());
}

FakeCluster::Call StartAs(FakeCluster& cluster, const std::string& tenant, const v1::GenerateRequest& request) {
  FakeCluster::Call call;
  call.id = cluster.router().NewCall();
  cluster.router().Generate(call.id, request, call.stream, tenant);
  return call;
}

TEST(YieldTest, AFloodLeavesAnotherTenantItsShareAtOnce) {
  FakeCluster cluster(Slots(2), Quantum(absl::Hours(1)));  // Nobody's time is up.
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> flood;
  for (int i = 0; i < 6; ++i) flood.push_back(StartAs(cluster, "flood", Request(Prompt(1 + i), 2000)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 4; }));
  const FakeCluster::Call quiet = StartAs(cluster, "quiet", Request(Prompt(9), 5));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return quiet.stream->closed();
  }));
  for (const FakeCluster::Call& call : flood) EXPECT_FALSE(call.stream->closed());
  EXPECT_EQ(cluster.metrics().yielded_turns.Value(), 1);  // One slot of two, and no more.
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(quiet).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(9), 5, kVocabulary)));
  for (int i = 1; i < 6; ++i) cluster.router().Cancel(flood[i].id);
  EXPECT_THAT(cluster.Finish(flood[0]).tokens, ElementsAreArray(FakeModel::Greedy(Prompt(1), 2000, kVocabulary)));
}

// As many turns of the flood go as others come, however long it takes them to go.
TEST(YieldTest, NoMoreYieldThanAreWanted) {
  FakeCluster cluster(Slots(8), Quantum(absl::Hours(1)));
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> flood, quiet;
  for (int i = 0; i < 16; ++i) flood.push_back(StartAs(cluster, "flood", Request(Prompt(1 + i), 5000)));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return std::count_if(flood.begin(), flood.end(),
                         [](const FakeCluster::Call& call) { return call.stream->received().size() >= 2; }) == 8;
  }));
  for (int i = 0; i < 3; ++i) quiet.push_back(StartAs(cluster, "quiet", Request(Prompt(40 + i), 2000)));
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return std::all_of(quiet.begin(), quiet.end(),
                       [](const FakeCluster::Call& call) { return call.stream->received().size() >= 2; });
  }));
  EXPECT_EQ(cluster.metrics().yielded_turns.Value(), 3);
  for (const FakeCluster::Call& call : flood) cluster.router().Cancel(call.id);
  for (const FakeCluster::Call& call : quiet) cluster.router().Cancel(call.id);
  cluster.pipeline().ResumeSteps();
}

// A client that has its answer and asks again does not find its slot with a flood, some turn of which would have to go.
TEST(YieldTest, ASlotWaitsAMomentForTheTenantsNextTurn) {
  testing::FakeClock clock;
  TurnManager::Options options = Quantum(absl::Hours(1));
  options.slot_kept = absl::Milliseconds(50);
  FakeCluster cluster(Slots(2), options, &clock);
  cluster.pipeline().PauseSteps();
  const auto ask = [&](uint32_t i) {
    const FakeCluster::Call quiet = StartAs(cluster, "quiet", Request(Prompt(i), 3));
    ASSERT_TRUE(WaitUntil([&] {
      cluster.pipeline().AllowSteps(1);
      return quiet.stream->closed();
    }));
    EXPECT_THAT(cluster.Finish(quiet).status, IsOk());
  };
  std::vector<FakeCluster::Call> flood;
  for (int i = 0; i < 6; ++i) flood.push_back(StartAs(cluster, "flood", Request(Prompt(1 + i), 5000)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 4; }));
  for (uint32_t i = 0; i < 20; ++i) {
    ask(20 + i);
    clock.Advance(absl::Milliseconds(49));  // It is that client's own time.
  }
  EXPECT_EQ(cluster.metrics().yielded_turns.Value(), 1) << "once, for the first";
  // Who does not come back in time finds the slot with the flood.
  const int waiting = cluster.router().counts().waiting;
  clock.Advance(absl::Milliseconds(51));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == waiting - 1; }));
  ask(50);
  EXPECT_EQ(cluster.metrics().yielded_turns.Value(), 2);
  for (const FakeCluster::Call& call : flood) cluster.router().Cancel(call.id);
  cluster.pipeline().ResumeSteps();
}

TEST(YieldTest, AFloodTakesNobodyElsesPlaceInTheLine) {
  TurnManager::Options options = Quantum(absl::Milliseconds(5));
  options.max_running = 1;
  options.max_waiting = 3;
  FakeCluster cluster(Slots(1), options);
  cluster.pipeline().PauseSteps();
  std::vector<FakeCluster::Call> flood;
  for (int i = 0; i < 4; ++i) flood.push_back(StartAs(cluster, "flood", Request(Prompt(1 + i), 2000)));
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 3; }));
  const FakeCluster::Call one_more = StartAs(cluster, "flood", Request(Prompt(8), 5));
  EXPECT_THAT(cluster.Finish(one_more).status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("3 wait")));
  const FakeCluster::Call quiet = StartAs(cluster, "quiet", Request(Prompt(9), 5));
  const absl::Status pushed_out = cluster.Finish(flood[3]).status;  // The last to come.
  EXPECT_THAT(pushed_out, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("of the tenant")));
  EXPECT_TRUE(common::GetRetryDelay(pushed_out).has_value());
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return quiet.stream->closed();
  }));
  EXPECT_THAT(cluster.Finish(quiet).status, IsOk());
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(flood[i].stream->closed());
    cluster.router().Cancel(flood[i].id);
  }
  cluster.pipeline().ResumeSteps();
}

}  // namespace
}  // namespace rwkv::router
