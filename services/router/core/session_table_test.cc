#include "services/router/core/session_table.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/router/core/core_context.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/scripted_world.h"
#include "services/router/core/turn.h"
#include "services/state_store/client/fake_state_store.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

absl::Time Limit() { return absl::Now() + absl::Seconds(60); }

// The session "s" has a turn, and the lease is held.
class SessionTableTest : public ::testing::Test {
 protected:
  SessionTableTest()
      : store_(*state_store::FakeStateStore::Create(&clock_)),
        metrics_(*common::Metrics::Create("")),
        router_metrics_(metrics_.get()),
        context_(Options(), &world_, store_.get(), &router_metrics_),
        table_(context_, [this](Session& session) { lost_.push_back(session.id); }) {
    v1::CreateSessionRequest create;
    create.set_session_id("s");
    EXPECT_THAT(store_->CreateSession(create, Limit()), IsOk());
    Session& session = table_.Of("s");
    session.leased = true;
    session.lease = Acquire("router-0").value().lease();
    session.turn = std::make_shared<Turn>();
    table_.Sweep();
    EXPECT_TRUE(world_.RunJobs()) << "renewed at once";
    EXPECT_FALSE(world_.RunJobs());
  }

  absl::StatusOr<v1::AcquireLeaseResponse> Acquire(const std::string& holder) {
    v1::AcquireLeaseRequest acquire = table_.AcquireRequest("s");
    acquire.set_holder(holder);
    return store_->AcquireLease(acquire, Limit());
  }

  // Until a sweep has something done, of the store too.
  void Pass(absl::Duration time) {
    world_.now += time;
    clock_.Advance(time);
    table_.Sweep();
  }

  static TurnOptions Options() {
    TurnOptions options;
    options.router = "router-0";
    options.incarnation = "1";
    options.lease_ttl = absl::Seconds(15);
    return options;
  }

  rwkv::testing::FakeClock clock_;
  ScriptedWorld world_;
  const std::unique_ptr<state_store::FakeStateStore> store_;
  const std::unique_ptr<common::Metrics> metrics_;
  RouterMetrics router_metrics_;
  const CoreContext context_;
  std::vector<std::string> lost_;
  SessionTable table_;
};

TEST_F(SessionTableTest, LeasesAreRenewedThreeTimesAsOftenAsTheyRunOut) {
  for (int i = 0; i < 4; ++i) {
    Pass(absl::Milliseconds(4999));
    EXPECT_THAT(world_.jobs, IsEmpty());
    Pass(absl::Milliseconds(1));
    EXPECT_TRUE(world_.RunJobs());
    EXPECT_THAT(Acquire("router-1").status(), StatusIs(absl::StatusCode::kAborted));
  }
  EXPECT_THAT(lost_, IsEmpty());
}

TEST_F(SessionTableTest, ARenewalThatIsNotAnsweredIsNotAskedForAgain) {
  Pass(absl::Seconds(5));
  ASSERT_EQ(world_.jobs.size(), 1);
  Pass(absl::Seconds(5));
  EXPECT_EQ(world_.jobs.size(), 1);
  EXPECT_TRUE(world_.RunJobs());
  Pass(absl::Milliseconds(1));
  EXPECT_EQ(world_.jobs.size(), 1) << "and the next one is late";
}

// Without a turn, and with a snapshot on its way.
TEST_F(SessionTableTest, ALeaseThatNobodyWaitsForRunsOutAndIsTakenAnew) {
  Session& session = *table_.Find("s");
  session.turn = nullptr;
  session.saves = 1;
  Pass(absl::Seconds(5));
  EXPECT_THAT(world_.jobs, IsEmpty());
  EXPECT_TRUE(session.leased);
  EXPECT_TRUE(session.stale);
  Pass(absl::Seconds(10));
  EXPECT_THAT(Acquire("router-1"), IsOk());
}

TEST_F(SessionTableTest, WhoeverWaitsForASessionToCloseKeepsItsLease) {
  Session& session = *table_.Find("s");
  session.next = std::exchange(session.turn, nullptr);
  Pass(absl::Seconds(5));
  EXPECT_EQ(world_.jobs.size(), 1);
  EXPECT_FALSE(session.stale);
}

TEST_F(SessionTableTest, ALeaseThatAnotherHasIsToldOfOnce) {
  Session& session = *table_.Find("s");
  clock_.Advance(absl::Seconds(15));  // This router's clock is behind.
  ASSERT_THAT(Acquire("router-1"), IsOk());
  Pass(absl::Seconds(5));
  EXPECT_TRUE(world_.RunJobs());
  EXPECT_THAT(lost_, ElementsAre("s"));
  EXPECT_FALSE(session.leased);
  Pass(absl::Seconds(5));
  EXPECT_FALSE(world_.RunJobs());
}

// What was lost is the lease from before.
TEST_F(SessionTableTest, ALeaseThatWasTakenAnewMeanwhileIsNotLost) {
  Session& session = *table_.Find("s");
  clock_.Advance(absl::Seconds(15));
  v1::ReleaseLeaseRequest release;
  *release.mutable_lease() = Acquire("router-1").value().lease();
  ASSERT_THAT(store_->ReleaseLease(release, Limit()), IsOk());
  Pass(absl::Seconds(5));
  session.lease = Acquire("router-0").value().lease();
  EXPECT_TRUE(world_.RunJobs());
  EXPECT_THAT(lost_, IsEmpty());
  EXPECT_TRUE(session.leased);
}

TEST_F(SessionTableTest, ASessionThatNobodyNeedsIsGivenBackAndForgotten) {
  table_.Find("s")->turn = nullptr;
  Pass(absl::ZeroDuration());
  EXPECT_THAT(world_.jobs, IsEmpty()) << "nobody said so";
  table_.Touch(*table_.Find("s"));
  Pass(absl::ZeroDuration());
  EXPECT_TRUE(table_.Find("s")->releasing);
  EXPECT_EQ(world_.jobs.size(), 1);
  Pass(absl::ZeroDuration());
  EXPECT_EQ(world_.jobs.size(), 1) << "once";
  EXPECT_TRUE(world_.RunJobs());
  EXPECT_THAT(Acquire("router-1"), IsOk());
  Pass(absl::ZeroDuration());
  EXPECT_TRUE(table_.empty());
}

}  // namespace
}  // namespace rwkv::router
