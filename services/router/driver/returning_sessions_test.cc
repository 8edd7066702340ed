// Sessions that another router takes, and that come back, while a snapshot of them is still on its way.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/driver/lanes_testing.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;
using worker::FakeModel;

// Two routers with a lane each. The session "s" has had a turn at the first, and its snapshot hangs.
class ReturningSessionsTest : public ::testing::Test {
 protected:
  ReturningSessionsTest()
      : cluster_(Named("a"), Options("router-0"), &clock_, {Named("b")}),
        other_(cluster_.MakeRouter(Options("router-1"))) {
    EXPECT_TRUE(WaitForLanes(*other_, 1));
    EXPECT_TRUE(WaitForLanes(cluster_.router(), 1));
    own_ = cluster_.pipeline(0).driver(0) == "router-0" ? 0 : 1;
    cluster_.CreateSession("s");
    cluster_.pipeline(own_).HoldSaves(true);
    log_ = Prompt(1);
    Turn(cluster_.router(), "first");
  }

  static TurnManager::Options Options(const std::string& name) {
    TurnManager::Options options = Router(name);
    options.snapshot_interval_tokens = 1024;
    options.executor_threads = 1;
    return options;
  }

  // Five tokens more, after all that the session has, and after `input`.
  void Turn(TurnManager& router, const std::string& request_id, const std::vector<uint32_t>& input = Prompt(1)) {
    const FakeCluster::Answer answer =
        cluster_.Finish(FakeCluster::Start(router, SessionRequest("s", request_id, input, 5)));
    ASSERT_THAT(answer.status, IsOk()) << request_id;
    if (request_id != "first") log_ = Concat(log_, input);
    EXPECT_EQ(answer.tokens, FakeModel::Greedy(log_, 5, kVocabulary)) << request_id;
    log_ = Concat(log_, answer.tokens);
  }

  // What the first router had to tell the store by then lies between two calls of it behind each other.
  void LetTheFirstRouterAct(TurnManager& router) {
    for (int call = 0; call < 2; ++call) {
      EXPECT_THAT(cluster_.Finish(FakeCluster::Start(router, SessionRequest("nobodys", "a", Prompt(1), 5))).status,
                  StatusIs(absl::StatusCode::kNotFound));
    }
  }

  void LetTheLeaseRunOut() {
    for (int i = 0; i < 4; ++i) {
      clock_.Advance(Options("").lease_ttl / 4);
      LetTheFirstRouterAct(cluster_.router());
    }
    clock_.Advance(absl::Seconds(1));
  }

  // The other router has given the session back.
  void WaitUntilFree() {
    EXPECT_TRUE(WaitUntil([this] {
      v1::AcquireLeaseRequest acquire;
      acquire.set_session_id("s");
      acquire.set_holder("nobody");
      acquire.set_incarnation("ever");
      acquire.mutable_ttl()->set_seconds(1);
      const auto lease = cluster_.store().AcquireLease(acquire, absl::Now() + kTestLimit);
      if (!lease.ok()) return false;
      v1::ReleaseLeaseRequest release;
      *release.mutable_lease() = lease->lease();
      return cluster_.store().ReleaseLease(release, absl::Now() + kTestLimit).ok();
    }));
  }

  rwkv::testing::FakeClock clock_;
  FakeCluster cluster_;
  const std::unique_ptr<TurnManager> other_;
  int own_ = 0;
  std::vector<uint32_t> log_;
};

// Nobody waits until a snapshot that hangs is given up: its session is another router's when the lease has run out.
TEST_F(ReturningSessionsTest, ASnapshotOnItsWayKeepsNoOtherRouterFromIt) {
  const absl::Status held =
      cluster_.Finish(FakeCluster::Start(*other_, SessionRequest("s", "second", Prompt(2), 5))).status;
  EXPECT_THAT(held, StatusIs(absl::StatusCode::kAborted, HasSubstr("router-0")));
  EXPECT_EQ(common::GetRetryDelay(held), absl::Seconds(1)) << "the snapshot may be there by then";
  LetTheLeaseRunOut();
  Turn(*other_, "second", Prompt(2));
  cluster_.pipeline(own_).HoldSaves(false);
  EXPECT_TRUE(WaitUntil([&] { return cluster_.metrics().snapshots_failed.Value() == 1; })) << "it is fenced";
}

TEST_F(ReturningSessionsTest, ItGoesOnThoughTheSnapshotStillHangs) {
  LetTheLeaseRunOut();
  Turn(*other_, "second", Prompt(2));
  WaitUntilFree();
  Turn(cluster_.router(), "third", Prompt(3));
}

// It is taken with the turn, not when leases are renewed the next time.
TEST_F(ReturningSessionsTest, WhoGoesOnWhereTheLeaseRanOutHasItAgain) {
  LetTheLeaseRunOut();
  cluster_.pipeline(own_).PauseSteps();
  const FakeCluster::Call call = cluster_.Start(SessionRequest("s", "second", Prompt(2), 5));
  ASSERT_TRUE(WaitUntil([&] { return cluster_.pipeline(own_).stats().attaches_warm == 1; }));
  EXPECT_THAT(cluster_.Finish(FakeCluster::Start(*other_, SessionRequest("s", "third", Prompt(3), 5))).status,
              StatusIs(absl::StatusCode::kAborted, HasSubstr("router-0")));
  cluster_.pipeline(own_).ResumeSteps();
  EXPECT_THAT(cluster_.Finish(call).status, IsOk());
}

// It is the state after a log that is not the session's any more.
TEST_F(ReturningSessionsTest, ASnapshotFromBeforeARewindElsewhereIsGivenUp) {
  LetTheLeaseRunOut();
  ASSERT_THAT(Rewind(cluster_, *other_, "s", 5), IsOk());
  log_.resize(5);
  Turn(*other_, "second", Prompt(2));
  WaitUntilFree();
  Turn(cluster_.router(), "third", Prompt(3));
  cluster_.pipeline(own_).HoldSaves(false);
  EXPECT_TRUE(WaitUntil([&] { return cluster_.metrics().snapshots_committed.Value() >= 1; }));
  EXPECT_TRUE(WaitUntil([&] { return cluster_.metrics().snapshots_failed.Value() >= 1; }));
  // At another router, which has to read what is there.
  WaitUntilFree();
  v1::FindSnapshotRequest find;
  find.set_session_id("s");
  find.set_at_or_before(14);
  find.set_model_fingerprint(cluster_.router().model()->info.fingerprint());
  const auto found = cluster_.store().FindSnapshot(find, absl::Now() + kTestLimit);
  ASSERT_THAT(found, IsOk());
  EXPECT_EQ(found->manifest().snapshot_id(), "");
  Turn(*other_, "fourth", Prompt(4));
}

// A rewind waits for it a little, lest it is lost, and a delete as well.
TEST_F(ReturningSessionsTest, ARewindDoesNotWaitForItForLong) {
  absl::Notification ended;
  absl::Status status;
  const auto rewind = [&](const v1::AcquireLeaseResponse& held) {
    v1::RewindSessionRequest request;
    *request.mutable_lease() = held.lease();
    request.set_position(5);
    return cluster_.store().RewindSession(request, absl::Now() + kTestLimit).status();
  };
  cluster_.router().Exclusive(cluster_.router().NewCall(), "s", false, rewind, [&](const absl::Status& answer) {
    status = answer;
    ended.Notify();
  });
  ASSERT_TRUE(WaitUntil([&] { return cluster_.router().counts().waiting == 1; }));
  clock_.Advance(absl::Milliseconds(4999));
  LetTheFirstRouterAct(cluster_.router());
  EXPECT_FALSE(ended.HasBeenNotified()) << "it may still come";
  clock_.Advance(absl::Milliseconds(1));
  ASSERT_TRUE(Waited(ended.WaitForNotificationWithTimeout(WaitLimit())));
  EXPECT_THAT(status, IsOk());
  log_.resize(5);
  Turn(cluster_.router(), "second", Prompt(2));
  cluster_.pipeline(own_).HoldSaves(false);
  EXPECT_TRUE(WaitUntil([&] { return cluster_.metrics().snapshots_failed.Value() == 1; }));
  EXPECT_TRUE(WaitUntil([&] { return cluster_.metrics().snapshots_committed.Value() == 1; }));
}

}  // namespace
}  // namespace rwkv::router
