#include "services/router/core/turn_opener.h"

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "services/state_store/client/fake_state_store.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

absl::Time Limit() { return absl::Now() + absl::Seconds(60); }

// The session "s" at the store, and a turn of it that is about to be opened.
struct Opens {
  Opens() {
    v1::CreateSessionRequest create;
    create.set_session_id("s");
    EXPECT_THAT(store->CreateSession(create, Limit()), IsOk());
    turn->request_id = "a";
    turn->named = true;
  }
  static TurnOptions Options() {
    TurnOptions options;
    options.router = "router-0";
    options.incarnation = "1";
    options.lease_ttl = absl::Seconds(15);
    return options;
  }
  absl::StatusOr<v1::AcquireLeaseResponse> Acquire(const std::string& holder) {
    v1::AcquireLeaseRequest acquire = core.sessions.AcquireRequest("s");
    acquire.set_holder(holder);
    return store->AcquireLease(acquire, Limit());
  }
  void Open() {
    opener.Open(turn);
    EXPECT_EQ(turn->phase(), Phase::kOpening);
    core.world.RunJobs();
  }
  // This router has the lease, since before.
  void Hold() {
    session.lease = Acquire("router-0").value().lease();
    session.leased = true;
  }

  rwkv::testing::FakeClock clock;
  std::unique_ptr<state_store::FakeStateStore> store = *state_store::FakeStateStore::Create(&clock);
  CoreParts core{Options(), 2, store.get()};
  std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>();
  TurnOpener opener{core.context, core.placement, &core.sessions, &core.streams, &core.slots, &core.ends};
  TurnPtr turn = core.Start(Phase::kWaiting, "", "s", stream);
  Session& session = *turn->session;
};

TEST(TurnOpenerTest, ATurnGetsItsSessionAndItsPlaceInTheLog) {
  Opens opens;
  opens.Open();
  EXPECT_EQ(opens.turn->phase(), Phase::kParked);
  EXPECT_TRUE(opens.session.leased);
  EXPECT_EQ(opens.session.model_fingerprint, "f");
  EXPECT_EQ(opens.turn->begin, 0);
  EXPECT_EQ(opens.turn->answer->size(), 0);
  EXPECT_THAT(opens.Acquire("router-1").status(), StatusIs(absl::StatusCode::kAborted)) << "nobody else has it";
}

TEST(TurnOpenerTest, ALeaseThatIsHeldIsUsed) {
  Opens opens;
  opens.Hold();
  const uint64_t token = opens.session.lease.fencing_token();
  opens.Open();
  EXPECT_EQ(opens.turn->phase(), Phase::kParked);
  EXPECT_EQ(opens.session.lease.fencing_token(), token);
}

// The log may have changed under it.
TEST(TurnOpenerTest, OneThatIsStaleIsTakenAnewAndTheLogReadAgain) {
  Opens opens;
  opens.Hold();
  opens.session.stale = true;
  opens.session.durable_length = 17;  // It was cut since.
  opens.Open();
  EXPECT_EQ(opens.turn->phase(), Phase::kParked);
  EXPECT_FALSE(opens.session.stale);
  EXPECT_EQ(opens.turn->begin, 0);
  EXPECT_LT(opens.session.durable_length, 17);
}

TEST(TurnOpenerTest, OneThatAnotherRouterHasByNowIsStaleFromThenOn) {
  Opens opens;
  opens.Hold();
  opens.clock.Advance(absl::Seconds(16));
  ASSERT_THAT(opens.Acquire("router-1"), IsOk());
  opens.Open();
  EXPECT_THAT(opens.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kAborted)));
  EXPECT_TRUE(opens.session.stale);
  EXPECT_EQ(opens.turn->phase(), Phase::kComputed);
}

TEST(TurnOpenerTest, OneThatLeftMeanwhileGoesNoFurther) {
  Opens opens;
  opens.opener.Open(opens.turn);
  opens.core.ends.Abandon(*opens.turn);
  opens.core.world.RunJobs();
  EXPECT_EQ(opens.turn->phase(), Phase::kComputed);
  EXPECT_FALSE(opens.turn->answer->finished());
}

TEST(TurnOpenerTest, ATurnThatIsKnownWithAnotherInputIsLeftAsItIs) {
  Opens opens;
  opens.Open();
  const auto stream = std::make_shared<HeldStream>();
  const TurnPtr again = opens.core.Start(Phase::kWaiting, "", "s", stream);
  again->request_id = "a";
  again->prompt = {1, 2, 4};
  opens.opener.Open(again);
  opens.core.world.RunJobs();
  EXPECT_THAT(stream->closed, ElementsAre(StatusIs(absl::StatusCode::kInvalidArgument)));
  EXPECT_TRUE(again->abandoned);
}

TEST(TurnOpenerTest, WhatIsBeyondTheTokensOfATurnIsOutOfRange) {
  Opens opens;
  opens.turn->resume_from = 1;
  opens.Open();
  EXPECT_THAT(opens.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kOutOfRange)));
}

TEST(TurnOpenerTest, WhatWasDoneUnderTheLeaseMakesWhatIsKnownStale) {
  Opens opens;
  opens.Hold();
  absl::Status told = absl::UnknownError("not told");
  bool done = false;
  opens.turn->kind = std::make_unique<ExclusiveCall>(
      [&done](const v1::AcquireLeaseResponse&) {
        done = true;
        return absl::OkStatus();
      },
      false, [&told](const absl::Status& status) { told = status; });
  opens.opener.RunExclusive(opens.turn);
  opens.core.world.RunJobs();
  EXPECT_TRUE(done);
  EXPECT_THAT(told, IsOk());
  EXPECT_TRUE(opens.session.stale);
  EXPECT_TRUE(opens.session.leased);
  EXPECT_EQ(opens.turn->phase(), Phase::kComputed);
}

TEST(TurnOpenerTest, ALeaseGoesWithASessionThatIsDeleted) {
  Opens opens;
  opens.turn->kind = std::make_unique<ExclusiveCall>([](const v1::AcquireLeaseResponse&) { return absl::OkStatus(); },
                                                     true, [](const absl::Status&) {});
  opens.opener.RunExclusive(opens.turn);
  opens.core.world.RunJobs();
  EXPECT_FALSE(opens.session.leased);
}

}  // namespace
}  // namespace rwkv::router
