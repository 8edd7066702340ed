#include "services/router/core/turn_table.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

TEST(TurnTableTest, ATurnIsFoundByIdByCallAndBySequence) {
  TurnTable turns;
  const auto turn = std::make_shared<Turn>();
  turn->id = turns.NewId();
  turn->call = 17;
  EXPECT_EQ(turns.Find(turn->id), nullptr);
  EXPECT_EQ(turns.FindCall(17), nullptr);
  turns.Add(turn);
  turns.AddCall(turn);
  EXPECT_EQ(turns.Find(turn->id), turn);
  EXPECT_EQ(turns.FindCall(17), turn);
  turns.EraseCall(17);
  EXPECT_EQ(turns.FindCall(17), nullptr);

  const SequenceId next = turns.next_sequence();
  turns.Seat(turn);
  EXPECT_EQ(turn->sequence, next);
  EXPECT_EQ(turns.FindSequence(next), turn);
  EXPECT_NE(turns.next_sequence(), next);
  turns.Unseat(*turn);
  EXPECT_EQ(turn->sequence, 0);
  EXPECT_EQ(turns.FindSequence(next), nullptr);

  turns.Erase(turn);
  EXPECT_TRUE(turns.running().empty());
  EXPECT_EQ(turns.Find(turn->id), nullptr);
}

TEST(TurnTableTest, WhoHasAPartOfTheSlots) {
  CoreParts core({});
  EXPECT_THAT(core.turns.tally().active(), IsEmpty());
  core.Start(Phase::kRunning, "a");
  core.Start(Phase::kOpening, "a")->set_pool("g/x");
  core.Start(Phase::kYielded, "a");
  core.Start(Phase::kComputed, "b");
  const TurnPtr yielding = core.Start(Phase::kRunning, "b");
  EXPECT_THAT(core.turns.tally().active(), UnorderedElementsAre(Pair("f/x", 2), Pair("g/x", 1)));
  EXPECT_THAT(core.turns.tally().held(""), UnorderedElementsAre(Pair("a", 2), Pair("b", 1)));
  EXPECT_THAT(core.turns.tally().held("f/x"), UnorderedElementsAre(Pair("a", 1), Pair("b", 1)));
  yielding->set_yielding(true);  // It has a part still, and no right to it.
  EXPECT_THAT(core.turns.tally().active(), UnorderedElementsAre(Pair("f/x", 2), Pair("g/x", 1)));
  EXPECT_THAT(core.turns.tally().held("f/x"), UnorderedElementsAre(Pair("a", 1)));
}

}  // namespace
}  // namespace rwkv::router
