#include "services/router/core/waiting_line.h"

#include <string>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

TurnOptions Options(int max_running = 8) {
  TurnOptions options;
  options.max_running = max_running;
  options.max_waiting = 3;
  options.max_wait = absl::Seconds(10);
  options.slot_kept = absl::Milliseconds(50);
  options.tenant_weight = [](const std::string& tenant) { return tenant == "heavy" ? 3.0 : 1.0; };
  return options;
}

TurnPtr Wait(CoreParts& core, const std::string& tenant) {
  const TurnPtr turn = core.MakeTurn(tenant);
  core.line.Add(turn);
  return turn;
}

TurnPtr Yield(CoreParts& core, const std::string& tenant) {
  const TurnPtr turn = core.Start(Phase::kYielded, tenant);
  core.line.Add(turn);
  return turn;
}

TEST(WaitingLineTest, ACallFitsWhileItsPoolHasASlot) {
  CoreParts core(Options());
  const TurnPtr call = core.MakeTurn("");
  EXPECT_TRUE(core.line.Fits(*call, {}));
  EXPECT_TRUE(core.line.Fits(*call, {{CoreParts::kPool, 1}}));
  EXPECT_FALSE(core.line.Fits(*call, {{CoreParts::kPool, 2}}));
  core.Start(Phase::kRunning, "");
  EXPECT_TRUE(core.line.CanStart(*call));
  core.Start(Phase::kParked, "");
  EXPECT_FALSE(core.line.CanStart(*call));
}

TEST(WaitingLineTest, OneWhosePoolIsGoneFitsAnywayToMeetItsEnd) {
  CoreParts core(Options());
  const TurnPtr call = core.MakeTurn("");
  call->set_pool("f/gone");
  EXPECT_TRUE(core.line.Fits(*call, {{CoreParts::kPool, 2}}));
}

TEST(WaitingLineTest, NoMoreRunThanMayAndThoseInTheLineDoNot) {
  CoreParts core(Options(2), 8);
  const TurnPtr call = core.MakeTurn("");
  core.Start(Phase::kRunning, "");
  EXPECT_FALSE(core.line.RunsMost());
  const TurnPtr other = core.Start(Phase::kRunning, "");
  EXPECT_TRUE(core.line.RunsMost());
  EXPECT_FALSE(core.line.CanStart(*call));
  other->set_phase(Phase::kYielded);
  core.line.Add(other);
  EXPECT_EQ(core.line.running(), 1);
  EXPECT_TRUE(core.line.CanStart(*call));
  EXPECT_TRUE(core.line.Remove(*other));
  EXPECT_TRUE(core.line.RunsMost());
  EXPECT_FALSE(core.line.Remove(*other));
}

TEST(WaitingLineTest, WhoLostItsLaneIsBeforeAllWhoDidNot) {
  CoreParts core(Options());
  const TurnPtr call = Wait(core, "");
  const auto lose = [&core] {
    const TurnPtr turn = core.Start(Phase::kYielded, "");
    turn->lost_since = core.world.now;
    core.line.AddLost(turn);
    return turn;
  };
  const TurnPtr first = lose(), second = lose();
  EXPECT_THAT(core.line.turns(), ElementsAre(first, second, call));
  EXPECT_EQ(core.line.running(), 0);
}

// Those that are started if all that starts has a part of the slots.
std::vector<TurnPtr> Offer(CoreParts& core) {
  std::vector<TurnPtr> started;
  core.line.OfferRoom([&](const TurnPtr& turn) {
    started.push_back(turn);
    turn->set_phase(Phase::kParked);
    turn->set_pool(CoreParts::kPool);
    core.turns.Add(turn);
  });
  return started;
}

TEST(WaitingLineTest, RoomIsOfferedFairlyBetweenTenants) {
  CoreParts core(Options(), 4);
  core.Start(Phase::kRunning, "flood");
  const TurnPtr a = Wait(core, "flood"), b = Wait(core, "flood"), c = Wait(core, "quiet");
  EXPECT_THAT(Offer(core), ElementsAre(c, a, b));
  EXPECT_TRUE(core.line.empty());
}

TEST(WaitingLineTest, RoomIsOfferedAsLongAsThereIsSome) {
  CoreParts core(Options(), 2);
  const TurnPtr a = Wait(core, "flood"), b = Wait(core, "flood"), c = Wait(core, "quiet");
  EXPECT_THAT(Offer(core), ElementsAre(a, c));
  EXPECT_THAT(Offer(core), IsEmpty());
  a->set_phase(Phase::kComputed);
  EXPECT_THAT(Offer(core), ElementsAre(b));
}

TEST(WaitingLineTest, WhoNeedsNoSlotOrHasNoModelAnyMoreIsBehindNobody) {
  CoreParts core(Options(), 2);
  core.Start(Phase::kRunning, "");
  core.Start(Phase::kRunning, "");
  const TurnPtr waits = Wait(core, "");
  EXPECT_THAT(Offer(core), IsEmpty());
  const TurnPtr homeless = core.MakeTurn("");
  homeless->set_pool("f/gone");
  const TurnPtr slotless = core.MakeTurn("");
  slotless->kind = std::make_unique<ExclusiveCall>(nullptr, false, [](const absl::Status&) {});
  core.line.Add(homeless);
  core.line.Add(slotless);
  EXPECT_THAT(Offer(core), ElementsAre(homeless, slotless));
  EXPECT_THAT(core.line.turns(), ElementsAre(waits));
}

// What nobody tells of: the session's snapshots are not waited for any longer.
TEST(WaitingLineTest, WhoMayStartByItselfInTimeIsLookedAtThen) {
  CoreParts core(Options());
  const TurnPtr call = core.MakeTurn("", "s");
  call->kind = std::make_unique<ExportCall>([](const absl::StatusOr<ExportedState>&) {});
  core.sessions.Of("s").saves = 1;
  core.line.Add(call);
  EXPECT_THAT(Offer(core), IsEmpty());
  core.world.now += kSaveWait;
  EXPECT_THAT(Offer(core), ElementsAre(call));
}

TEST(WaitingLineTest, TheLastOfWhoHasMostOfItGoes) {
  CoreParts core(Options());
  EXPECT_FALSE(core.line.full());
  EXPECT_FALSE(core.line.ChooseLeaver(*core.MakeTurn("quiet")).has_value());
  Wait(core, "flood");
  const TurnPtr last = Wait(core, "flood");
  Wait(core, "other");
  Yield(core, "flood");  // Was started: it does not go.
  EXPECT_TRUE(core.line.full());
  const auto leaver = core.line.ChooseLeaver(*core.MakeTurn("quiet"));
  ASSERT_TRUE(leaver.has_value());
  EXPECT_EQ(leaver->turn, last);
  EXPECT_EQ(leaver->waiting, 3);
  EXPECT_TRUE(core.line.ChooseLeaver(*core.MakeTurn("other")).has_value());
  EXPECT_FALSE(core.line.ChooseLeaver(*core.MakeTurn("flood")).has_value());
}

TEST(WaitingLineTest, AWeightyTenantHasMoreOfTheLine) {
  CoreParts core(Options());
  for (int i = 0; i < 3; ++i) Wait(core, "heavy");
  EXPECT_FALSE(core.line.ChooseLeaver(*core.MakeTurn("quiet")).has_value());
  Wait(core, "heavy");
  EXPECT_TRUE(core.line.ChooseLeaver(*core.MakeTurn("quiet")).has_value());
}

TEST(WaitingLineTest, OnlyCallsThatWereNeverStartedAreOverdue) {
  CoreParts core(Options());
  const TurnPtr call = Wait(core, "");
  Yield(core, "");
  core.world.now += absl::Seconds(10);
  EXPECT_THAT(core.line.Overdue(), IsEmpty());
  core.world.now += absl::Milliseconds(1);
  EXPECT_THAT(core.line.Overdue(), ElementsAre(call));
}

TEST(WaitingLineTest, ASlotIsKeptForTheTenantOfATurnThatIsOver) {
  CoreParts core(Options());
  const TurnPtr over = core.Start(Phase::kComputed, "quiet");
  const TurnPtr other = core.Start(Phase::kRunning, "flood");
  core.line.KeepSlot(*over);
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("flood")));  // Nobody waited.

  Wait(core, "flood");
  core.line.KeepSlot(*over);
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("flood")));  // It did not end by its answer.
  over->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  core.line.KeepSlot(*over);
  EXPECT_FALSE(core.line.CanStart(*core.MakeTurn("flood")));
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("quiet")));

  core.world.now += absl::Milliseconds(49);
  core.line.ExpireKept();
  EXPECT_FALSE(core.line.CanStart(*core.MakeTurn("flood")));
  core.world.now += absl::Milliseconds(1);
  core.line.ExpireKept();
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("flood")));

  core.line.KeepSlot(*over);
  core.line.UseKept(*over);
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("flood")));
}

TEST(WaitingLineTest, NoSlotIsKeptForWhoHasItsShareOrWaits) {
  CoreParts core(Options());
  const TurnPtr over = core.Start(Phase::kComputed, "a");
  over->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  core.Start(Phase::kRunning, "a");
  Wait(core, "b");
  core.line.KeepSlot(*over);  // Of two slots it has one already.
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("b")));
  core.turns.running().rbegin()->second->set_phase(Phase::kComputed);
  core.Start(Phase::kRunning, "b");
  Wait(core, "a");  // That one takes it.
  core.line.KeepSlot(*over);
  EXPECT_TRUE(core.line.CanStart(*core.MakeTurn("b")));
}

TEST(WaitingLineTest, ASessionLetsOneInAtATime) {
  CoreParts core(Options());
  const TurnPtr call = core.MakeTurn("", "s");
  EXPECT_TRUE(core.line.SessionFree(*call));
  Session& session = core.sessions.Of("s");
  EXPECT_TRUE(core.line.SessionFree(*call));
  session.saves = 1;  // Of interest to exports, and to changes of the log.
  EXPECT_TRUE(core.line.SessionFree(*call));
  session.next = call;
  EXPECT_TRUE(core.line.SessionFree(*call));
  session.next = core.MakeTurn("", "s");
  EXPECT_FALSE(core.line.SessionFree(*call));
  session.next = nullptr;
  session.releasing = true;
  EXPECT_FALSE(core.line.SessionFree(*call));
  session.releasing = false;
  session.turn = core.MakeTurn("", "s");
  EXPECT_FALSE(core.line.SessionFree(*call));
  call->set_phase(Phase::kYielded);  // It is that one.
  EXPECT_TRUE(core.line.SessionFree(*call));
}

TEST(WaitingLineTest, AnExportWaitsForTheSnapshotsOnTheirWay) {
  CoreParts core(Options());
  const TurnPtr call = core.MakeTurn("", "s");
  call->kind = std::make_unique<ExportCall>([](const absl::StatusOr<ExportedState>&) {});
  core.sessions.Of("s").saves = 1;
  EXPECT_FALSE(core.line.SessionFree(*call));
  core.world.now += kSaveWait - absl::Milliseconds(1);
  EXPECT_FALSE(core.line.SessionFree(*call));
  core.world.now += absl::Milliseconds(1);  // It may be a while.
  EXPECT_TRUE(core.line.SessionFree(*call));
  core.world.now -= kSaveWait;
  core.sessions.Of("s").saves = 0;
  EXPECT_TRUE(core.line.SessionFree(*call));
}

}  // namespace
}  // namespace rwkv::router
