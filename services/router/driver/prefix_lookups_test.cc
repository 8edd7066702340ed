// Who looks into the prefix cache, when, for how long, and when nobody does.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/driver/prefix_testing.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::ElementsAreArray;
using worker::FakeModel;
using worker::FakePipeline;

constexpr absl::Duration kPause = absl::Seconds(5);  // After an error.

uint64_t Reused(FakeCluster& cluster, const v1::GenerateRequest& request) {
  const FakeCluster::Answer answer = cluster.Generate(request);
  EXPECT_THAT(answer.status, IsOk());
  return answer.finish.reused_tokens();
}

TEST(PrefixLookupsTest, AfterOneThatFailedNobodyLooksForAWhile) {
  rwkv::testing::FakeClock clock;
  FakeCluster cluster({}, Caching(), &clock);
  uint32_t own = 2;
  ASSERT_THAT(cluster.Generate(Marked(own++)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.store().FailWith(absl::UnavailableError("the store is away"));
  EXPECT_EQ(Reused(cluster, Marked(own++)), 0);
  EXPECT_EQ(cluster.metrics().prefix_errors.Value(), 1);
  cluster.store().FailWith(absl::OkStatus());
  const int before = cluster.store().prefix_lookups();
  for (const absl::Duration later : {absl::ZeroDuration(), kPause - absl::Milliseconds(1)}) {
    clock.Advance(later);
    EXPECT_EQ(Reused(cluster, Marked(own++)), 0) << later;
    EXPECT_EQ(cluster.store().prefix_lookups(), before) << later;
  }
  clock.Advance(absl::Milliseconds(1));
  EXPECT_EQ(Reused(cluster, Marked(own++)), kSystem);
  EXPECT_EQ(cluster.store().prefix_lookups(), before + 1);
  EXPECT_EQ(cluster.metrics().prefix_errors.Value(), 1);
  EXPECT_EQ(cluster.metrics().prefix_hits.Value(), 1);
  EXPECT_EQ(cluster.metrics().prefix_misses.Value(), 1) << "who did not look has missed nothing";
}

TEST(PrefixLookupsTest, AfterASaveThatFailedNobodySavesForAWhileAndAllLook) {
  rwkv::testing::FakeClock clock;
  FakeCluster cluster({}, Caching(), &clock);
  uint32_t own = 2;
  ASSERT_THAT(cluster.Generate(Marked(own++)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  const int64_t kept_bytes = cluster.store().record_bytes();
  cluster.store().FailPrefixPutsWith(absl::ResourceExhaustedError("it is full"));
  EXPECT_EQ(Reused(cluster, Marked(own++)), kSystem);
  const int64_t saves = cluster.pipeline().stats().saves;
  ASSERT_EQ(saves, 4);
  ASSERT_TRUE(WaitUntil([&] { return cluster.PutRecords().size() == 16; }));  // Four layers each.
  ASSERT_TRUE(WaitUntil([&] { return cluster.store().record_bytes() == kept_bytes; }));
  cluster.store().FailPrefixPutsWith(absl::OkStatus());
  for (const absl::Duration later : {absl::ZeroDuration(), kPause - absl::Milliseconds(1)}) {
    clock.Advance(later);
    EXPECT_EQ(Reused(cluster, Marked(own++)), kSystem) << later;
    EXPECT_EQ(cluster.pipeline().stats().saves, saves) << later;
  }
  clock.Advance(absl::Milliseconds(1));
  EXPECT_EQ(Reused(cluster, Marked(own++)), kSystem);
  EXPECT_EQ(cluster.pipeline().stats().saves, saves + 1);
  EXPECT_TRUE(Kept(cluster, 4));
}

// Reading is never far.
TEST(PrefixLookupsTest, NobodyWaitsForOneForLong) {
  FakeCluster cluster({}, Caching());
  cluster.CreateSession("s");
  v1::GenerateRequest request = Marked(2);
  for (const bool has_session : {false, true}) {
    SCOPED_TRACE(has_session);
    if (has_session) {
      request.set_session_id("s");
      request.set_request_id("a");
    }
    ASSERT_THAT(cluster.Generate(request).status, IsOk());
    EXPECT_EQ(cluster.store().prefix_lookups(), has_session ? 2 : 1);
    EXPECT_LE(cluster.store().prefix_lookup_limit(), absl::Milliseconds(500));
    EXPECT_GT(cluster.store().prefix_lookup_limit(), absl::ZeroDuration());
  }
}

TEST(PrefixLookupsTest, WorkersKeepWhatIsSharedAndNothingElse) {
  FakeCluster cluster({}, Caching());
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Input(2), 5);
  ASSERT_THAT(cluster.Generate(request).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 1; }));
  EXPECT_EQ(cluster.pipeline().stats().saves, 4);
  EXPECT_EQ(cluster.pipeline().stats().saves_kept, 3);
  EXPECT_EQ(Reused(cluster, Marked(3)), kSystem);
  EXPECT_EQ(cluster.pipeline().stats().attaches_kept, 1);
  cluster.RestartRouter();
  EXPECT_GT(Reused(cluster, SessionRequest("s", "b", Prompt(1), 5)), kSystem);
  EXPECT_EQ(cluster.pipeline().stats().attaches_snapshot, 2);
  EXPECT_EQ(cluster.pipeline().stats().attaches_kept, 1);
}

// A state of an input's beginning is none of a session that has something before that.
TEST(PrefixLookupsTest, ALaterTurnOfASessionDoesNotLook) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.CreateSession("s");
  const FakeCluster::Answer first = cluster.Generate(SessionRequest("s", "a", Prompt(9), 5));
  ASSERT_THAT(first.status, IsOk());
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 1; }));
  cluster.RestartRouter();  // Nothing is warm.
  const int before = cluster.store().prefix_lookups();
  const double misses = cluster.metrics().prefix_misses.Value();
  const double kept = cluster.metrics().prefixes_kept.Value();
  const FakeCluster::Answer second = cluster.Generate(SessionRequest("s", "b", Input(2), 10));
  ASSERT_THAT(second.status, IsOk());
  EXPECT_EQ(second.finish.reused_tokens(), 14);
  EXPECT_THAT(second.tokens,
              ElementsAreArray(FakeModel::Greedy(Concat(Concat(Prompt(9), first.tokens), Input(2)), 10, kVocabulary)));
  EXPECT_EQ(cluster.store().prefix_lookups(), before);
  EXPECT_EQ(cluster.metrics().prefix_misses.Value(), misses);
  EXPECT_EQ(cluster.metrics().prefix_hits.Value(), 0);
  ASSERT_TRUE(WaitUntil([&] { return cluster.metrics().snapshots_committed.Value() == 2; }));
  EXPECT_EQ(cluster.metrics().prefixes_kept.Value(), kept);
}

TEST(PrefixLookupsTest, AnotherModelReadsItAgain) {
  FakePipeline::Options large;
  large.name = "b";
  large.model_name = "large";
  large.fingerprint = "000000000000000000000000000001a1";
  FakeCluster cluster({}, Caching(), nullptr, {large});
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().models().served.size() == 2; }));
  v1::GenerateRequest request = Marked(2);
  double kept = 0;
  for (const char* const model : {"fake", "large"}) {
    request.set_model(model);
    EXPECT_EQ(Reused(cluster, request), 0) << model;
    ASSERT_TRUE(Kept(cluster, kept += 3));
  }
  EXPECT_EQ(Reused(cluster, request), kSystem + 9);
}

// One that cannot be read is not found a second time, whether or not it is kept anew.
TEST(PrefixLookupsTest, OneThatCannotBeReadIsDroppedAtOnce) {
  FakeCluster cluster({}, Caching());
  uint32_t own = 2;
  ASSERT_THAT(cluster.Generate(Marked(own++)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  for (const v1::RecordInfo& info : cluster.PutRecords()) cluster.pipeline().LoseSnapshot(info.snapshot_id());
  cluster.pipeline().FailSaves(1000, absl::UnavailableError("nothing can be saved"));
  for (int i = 0; i < 50 && cluster.metrics().prefix_misses.Value() < 2; ++i) {
    EXPECT_EQ(Reused(cluster, Marked(own++)), 0);
  }
  EXPECT_EQ(cluster.metrics().prefix_misses.Value(), 2);
  EXPECT_EQ(cluster.metrics().prefixes_kept.Value(), 3);
}

// What it began with is everybody's: that of its own comes before long, not an interval later.
TEST(PrefixLookupsTest, ASessionThatBeginsWithOneHasAStateOfItsOwnBeforeLong) {
  TurnManager::Options options = Caching();
  options.snapshot_interval_tokens = 100;
  FakeCluster cluster({}, options);
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  cluster.CreateSession("s");
  v1::GenerateRequest request = SessionRequest("s", "a", Input(3), 50);
  request.add_prefix_ends(kSystem);
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(request);
  EXPECT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return cluster.metrics().snapshots_committed.Value() == 1 || call.stream->closed();
  }));
  EXPECT_FALSE(call.stream->closed()) << "it was saved at its end";
  cluster.pipeline().ResumeSteps();
  EXPECT_THAT(cluster.Finish(call).tokens, ElementsAreArray(FakeModel::Greedy(Input(3), 50, kVocabulary)));
}

}  // namespace
}  // namespace rwkv::router
