#include "services/router/core/yields.h"

#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

// Two turns of a tenant in a lane's two slots, both of which had them for long and got on, and one that waits.
struct Yielding {
  Yielding() {
    for (const TurnPtr& turn : {first, second}) {
      turn->slot_since = core.world.now - absl::Hours(1);
      turn->patience.Came(3);
    }
    second->slot_since = core.world.now - absl::Minutes(1);
    core.line.Add(waiting);
  }
  void Sweep() {
    for (const TurnPtr& turn : {first, second}) yields.Look(*turn);
    yields.Sweep();
  }

  CoreParts core{TurnOptions()};
  TurnPtr first = core.Seat("a"), second = core.Seat("a");
  TurnPtr waiting = core.MakeTurn("a");
  Yields yields{core.context, core.turns, core.line, core.placement, core.saves, core.slots};
};

TEST(YieldsTest, WhoHadItsSlotForLongestGivesItAway) {
  Yielding turns;
  turns.Sweep();
  EXPECT_TRUE(turns.first->yielding());
  EXPECT_FALSE(turns.second->yielding());
  turns.Sweep();  // One slot comes free: nobody needs another.
  EXPECT_FALSE(turns.second->yielding());
}

TEST(YieldsTest, NobodyDoesWhileNobodyWaitsOrASlotIsFree) {
  Yielding turns;
  turns.core.line.Remove(*turns.waiting);
  turns.Sweep();
  EXPECT_FALSE(turns.first->yielding());
  turns.core.line.Add(turns.waiting);
  turns.second->set_phase(Phase::kComputed);
  turns.Sweep();
  EXPECT_FALSE(turns.first->yielding());
}

TEST(YieldsTest, WhoGotNoFurtherThanBeforeKeepsItsSlot) {
  Yielding turns;
  turns.first->progress_at_slot = 3;
  turns.Sweep();
  EXPECT_FALSE(turns.first->yielding());
  EXPECT_TRUE(turns.second->yielding());
}

TEST(YieldsTest, WhoIsReadingItsLogOrHasItsEndKeepsItsSlot) {
  Yielding turns;
  turns.first->tail_pending = true;
  turns.second->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  turns.Sweep();
  EXPECT_FALSE(turns.first->yielding());
  EXPECT_FALSE(turns.second->yielding());
}

TEST(YieldsTest, NobodyYieldsForWhoCannotStart) {
  Yielding turns;
  turns.waiting->session_id = "s";
  Session& session = turns.core.sessions.Of("s");
  session.releasing = true;
  turns.Sweep();
  EXPECT_FALSE(turns.first->yielding());
  session.releasing = false;
  turns.core.line.Remove(*turns.waiting);
  turns.waiting->set_pool("g/x");
  turns.core.line.Add(turns.waiting);
  turns.Sweep();
  EXPECT_FALSE(turns.first->yielding());
  turns.core.line.Remove(*turns.waiting);
  turns.waiting->set_pool(CoreParts::kPool);
  turns.core.line.Add(turns.waiting);
  turns.Sweep();
  EXPECT_TRUE(turns.first->yielding());
}

}  // namespace
}  // namespace rwkv::router
