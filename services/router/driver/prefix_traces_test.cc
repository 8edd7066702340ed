// Traces of turns that look for what others have read.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/core/turn_trace.h"
#include "services/router/driver/prefix_testing.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;

// The stages that a turn enters, and in which its calls to the store are made.
class RecordedTrace final : public TurnTrace {
 public:
  void Enter(absl::string_view stage) override {
    absl::MutexLock lock(&mu_);
    if (stages_.empty() || stages_.back() != stage) stages_.emplace_back(stage);
  }
  std::string trace_parent() const override { return ""; }
  std::string trace_state() const override { return ""; }
  Within ForStore() const override {
    absl::MutexLock lock(&mu_);
    calls_.push_back(stages_.back());
    return [](const std::function<void()>& work) { work(); };
  }
  void OnFinish(const v1::Finish&) override {}

  // The first stages; an answer that comes all at once has no "decode".
  std::vector<std::string> First(size_t count) const {
    absl::MutexLock lock(&mu_);
    return {stages_.begin(), stages_.begin() + static_cast<int64_t>(std::min(count, stages_.size()))};
  }
  std::string stage() const {
    absl::MutexLock lock(&mu_);
    return stages_.back();
  }
  std::vector<std::string> calls() const {
    absl::MutexLock lock(&mu_);
    return calls_;
  }

 private:
  mutable absl::Mutex mu_;
  std::vector<std::string> stages_ ABSL_GUARDED_BY(mu_) = {""};
  mutable std::vector<std::string> calls_ ABSL_GUARDED_BY(mu_);
};

FakeCluster::Call StartTraced(FakeCluster& cluster, const v1::GenerateRequest& request,
                              const std::shared_ptr<RecordedTrace>& trace) {
  FakeCluster::Call call;
  call.id = cluster.router().NewCall();
  cluster.router().Generate(call.id, request, call.stream, "", trace);
  return call;
}

TEST(PrefixTracesTest, ALookupIsPartOfTheTrace) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  const auto trace = std::make_shared<RecordedTrace>();
  ASSERT_THAT(cluster.Finish(StartTraced(cluster, Marked(3), trace)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 4));
  EXPECT_THAT(trace->First(5), ElementsAre("", "queue", "locate", "attach", "prefill"));
  // Looked up, and its own end put.
  EXPECT_THAT(trace->calls(), ElementsAre("locate", ::testing::AnyOf("prefill", "decode", "")));
}

TEST(PrefixTracesTest, ALookupThatNobodyWaitsForLeavesNoSpanOpen) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  for (const bool has_session : {false, true}) {
    SCOPED_TRACE(has_session);
    v1::GenerateRequest request = Marked(3);
    if (has_session) {
      cluster.CreateSession("s");
      request.set_session_id("s");
    }
    const auto trace = std::make_shared<RecordedTrace>();
    cluster.store().HoldPrefixLookups(true);
    const FakeCluster::Call call = StartTraced(cluster, request, trace);
    ASSERT_TRUE(WaitUntil([&] { return cluster.store().held_prefix_lookups() == 1; }));
    EXPECT_EQ(trace->stage(), "locate");
    cluster.router().Cancel(call.id);
    EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kCancelled));
    EXPECT_TRUE(WaitUntil([&] { return trace->stage().empty(); }));
    EXPECT_EQ(cluster.store().held_prefix_lookups(), 1);
    cluster.store().HoldPrefixLookups(false);
    ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().running == 0; }));
    EXPECT_EQ(trace->stage(), "");
  }
}

TEST(PrefixTracesTest, ALaneThatIsLostDuringALookupIsWaitedForUnderItsName) {
  FakeCluster cluster({}, Caching());
  ASSERT_THAT(cluster.Generate(Marked(2)).status, IsOk());
  ASSERT_TRUE(Kept(cluster, 3));
  const auto trace = std::make_shared<RecordedTrace>();
  cluster.store().HoldPrefixLookups(true);
  const FakeCluster::Call call = StartTraced(cluster, Marked(3), trace);
  ASSERT_TRUE(WaitUntil([&] { return cluster.store().held_prefix_lookups() == 1; }));
  cluster.pipeline().Kill(1);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().Lanes(absl::Now() + kTestLimit).empty(); }));
  EXPECT_EQ(trace->stage(), "locate");
  cluster.store().HoldPrefixLookups(false);
  EXPECT_TRUE(WaitUntil([&] { return trace->stage() == "park"; }));
  cluster.pipeline().Restart(1);
  const FakeCluster::Answer answer = cluster.Finish(call);
  ASSERT_THAT(answer.status, IsOk());
  EXPECT_EQ(answer.finish.reused_tokens(), kSystem);
  ASSERT_TRUE(WaitUntil([&] { return trace->stage().empty(); }));
  EXPECT_THAT(trace->First(7), ElementsAre("", "queue", "locate", "park", "locate", "attach", "prefill"));
  EXPECT_EQ(cluster.metrics().prefix_hits.Value(), 1);
  EXPECT_EQ(cluster.metrics().reused_tokens.Value(), kSystem);
}

}  // namespace
}  // namespace rwkv::router
