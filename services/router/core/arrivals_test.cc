#include "services/router/core/arrivals.h"

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::rwkv::testing::StatusIs;
using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// One slot, and a line for two.
struct Door {
  static TurnOptions Options() {
    TurnOptions options;
    options.max_waiting = 2;
    options.max_wait = absl::Seconds(10);
    return options;
  }
  struct Call {
    TurnPtr turn;
    std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>();
  };
  Call Make(const std::string& tenant, const std::string& session = "", const std::string& request = "") {
    Call call;
    call.turn = core.MakeTurn(tenant, session, call.stream);
    call.turn->request_id = request;
    call.turn->named = !request.empty();
    return call;
  }
  Call Arrive(const std::string& tenant, const std::string& session = "", const std::string& request = "") {
    Call call = Make(tenant, session, request);
    arrivals.Arrive(call.turn);
    return call;
  }

  CoreParts core{Options(), 1};
  TurnOpener opener{core.context, core.placement, &core.sessions, &core.streams, &core.slots, &core.ends};
  Arrivals arrivals{core.context, core.placement, opener,      &core.turns, &core.sessions,
                    &core.line,   &core.streams,  &core.slots, &core.ends};
};

TEST(ArrivalsTest, WhoComesFirstIsStartedAndWhoComesNextWaits) {
  Door door;
  const Door::Call first = door.Arrive(""), second = door.Arrive("");
  EXPECT_EQ(first.turn->phase(), Phase::kParked);
  EXPECT_EQ(first.turn->pool(), CoreParts::kPool);
  EXPECT_EQ(second.turn->phase(), Phase::kWaiting);
  EXPECT_THAT(door.core.line.turns(), ElementsAre(second.turn));
  first.turn->set_phase(Phase::kComputed);
  door.arrivals.StartWaiting();
  EXPECT_EQ(second.turn->phase(), Phase::kParked);
  EXPECT_TRUE(door.core.line.empty());
}

TEST(ArrivalsTest, AFullLineMakesRoomForWhoHasLessOfIt) {
  Door door;
  door.Arrive("flood");
  const Door::Call stays = door.Arrive("flood"), leaves = door.Arrive("flood"), comes = door.Arrive("quiet");
  EXPECT_THAT(leaves.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("tenant"))));
  EXPECT_THAT(door.core.line.turns(), ElementsAre(stays.turn, comes.turn));
  EXPECT_THAT(comes.stream->closed, IsEmpty());
}

TEST(ArrivalsTest, AFullLineRefusesWhoHasAsMuchOfItAndSaysWhenToCome) {
  Door door;
  for (int i = 0; i < 3; ++i) door.Arrive("flood");
  const Door::Call refused = door.Arrive("flood");
  ASSERT_THAT(refused.stream->closed,
              ElementsAre(StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1 run and 2 wait"))));
  bool says_when = false;
  refused.stream->closed[0].ForEachPayload([&](absl::string_view, const absl::Cord&) { says_when = true; });
  EXPECT_TRUE(says_when);
  EXPECT_EQ(door.core.turns.FindCall(refused.turn->call), nullptr);
}

TEST(ArrivalsTest, WhoWaitedForTooLongIsRefused) {
  Door door;
  door.Arrive("");
  const Door::Call call = door.Arrive("");
  door.core.world.now += absl::Seconds(10);
  door.arrivals.RefuseOverdue();
  EXPECT_THAT(call.stream->closed, IsEmpty());
  door.core.world.now += absl::Milliseconds(1);
  door.arrivals.RefuseOverdue();
  EXPECT_THAT(call.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("10s"))));
  EXPECT_TRUE(door.core.line.empty());
}

TEST(ArrivalsTest, NobodyComesInOnceItDrains) {
  Door door;
  door.core.context.draining = true;
  EXPECT_THAT(door.Arrive("").stream->closed, ElementsAre(StatusIs(absl::StatusCode::kUnavailable)));
}

TEST(ArrivalsTest, WhoseModelHasNoLaneIsToldSo) {
  Door door;
  const Door::Call call = door.Make("");
  call.turn->model = std::make_shared<ServingModel>();
  door.arrivals.Arrive(call.turn);
  EXPECT_THAT(call.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no pipeline"))));
}

TEST(ArrivalsTest, ASessionHasOneTurnAtATime) {
  Door door;
  const Door::Call first = door.Arrive("", "s", "a");
  EXPECT_EQ(first.turn->phase(), Phase::kOpening);
  const Door::Call other = door.Arrive("", "s", "b");
  EXPECT_THAT(other.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kAborted, HasSubstr("another turn"))));
  EXPECT_THAT(first.stream->closed, IsEmpty());
}

TEST(ArrivalsTest, ALaterCallOfATurnTakesItOver) {
  Door door;
  const Door::Call first = door.Arrive("", "s", "a"), second = door.Arrive("", "s", "a");
  EXPECT_THAT(first.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kAborted, HasSubstr("took over"))));
  EXPECT_THAT(second.stream->closed, IsEmpty());
  EXPECT_EQ(door.core.turns.FindCall(second.turn->call), first.turn);
  EXPECT_EQ(door.core.turns.running().size(), 1);
}

TEST(ArrivalsTest, ALaterCallWithAnotherInputDoesNot) {
  Door door;
  const Door::Call first = door.Arrive("", "s", "a");
  const Door::Call second = door.Make("", "s", "a");
  second.turn->prompt.push_back(4);
  door.arrivals.Arrive(second.turn);
  EXPECT_THAT(second.stream->closed,
              ElementsAre(StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("request_id"))));
  EXPECT_THAT(first.stream->closed, IsEmpty());
}

TEST(ArrivalsTest, OneThatYieldedIsStartedWhereItStands) {
  Door door;
  const TurnPtr turn = door.core.Start(Phase::kYielded, "");
  door.core.line.Add(turn);
  door.arrivals.StartWaiting();
  EXPECT_EQ(turn->phase(), Phase::kParked);
  EXPECT_EQ(door.core.turns.running().size(), 1);
}

}  // namespace
}  // namespace rwkv::router
