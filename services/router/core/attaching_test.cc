#include "services/router/core/attaching.h"

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/router/core/core_testing.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// A turn of a session, whose slot is being attached from a snapshot of its log at `position`.
struct Attaches {
  explicit Attaches(uint64_t position, bool has_snapshot = true) {
    turn->begin = 20;
    if (has_snapshot) turn->snapshot.set_snapshot_id("snapshot");
    turn->snapshot.set_position(position);
    turn->tail.assign(20 - position, 9);
    attaching.Admit(turn, position);
  }
  void Answer(const absl::Status& status) {
    v1::SequenceAttached attached;
    attached.set_sequence(turn->sequence);
    *attached.mutable_status() = common::ToStatusProto(status);
    attaching.OnAnswer(attached);
  }

  CoreParts core{{}};
  Attaching attaching{core.context, core.placement, &core.turns, &core.prefixes, &core.slots, &core.ends};
  TurnPtr turn = core.Start(Phase::kParked, "", "s");
};

TEST(AttachingTest, ATurnIsFedFromWhereItsSlotStands) {
  Attaches attaches(10);
  const Turn& turn = *attaches.turn;
  EXPECT_EQ(turn.phase(), Phase::kAttaching);
  EXPECT_EQ(turn.attach_position, 10);
  EXPECT_EQ(turn.done_end, 10);
  EXPECT_EQ(turn.planned_end, 10);
  EXPECT_EQ(turn.fed_end, 23) << "the log's tail, and the three of its input";
  attaches.core.lane().scheduler.Plan();
  attaches.Answer(absl::OkStatus());
  EXPECT_EQ(turn.phase(), Phase::kRunning);
  EXPECT_EQ(turn.reused_tokens, 10);
}

TEST(AttachingTest, ItRunsWhenEveryStageHasAttachedIt) {
  Attaches attaches(10);
  attaches.core.lane().scheduler.Plan();
  attaches.turn->attach_answers_left = 2;
  attaches.Answer(absl::OkStatus());
  EXPECT_EQ(attaches.turn->phase(), Phase::kAttaching);
  attaches.Answer(absl::OkStatus());
  EXPECT_EQ(attaches.turn->phase(), Phase::kRunning);
}

TEST(AttachingTest, WithoutALaneItWaitsForOne) {
  Attaches attaches(10);
  attaches.core.slots.Remove(*attaches.turn);
  attaches.core.placement.Close(attaches.core.lane());
  attaches.turn->set_phase(Phase::kLocating);
  attaches.attaching.Admit(attaches.turn, 10);
  EXPECT_EQ(attaches.turn->phase(), Phase::kParked);
  EXPECT_EQ(attaches.turn->sequence, 0);
}

// Or it would be found again, and again.
TEST(AttachingTest, ASnapshotThatIsUnusableIsDroppedAndAnOlderOneLookedFor) {
  Attaches attaches(10);
  attaches.Answer(absl::DataLossError("its sums are wrong"));
  EXPECT_EQ(attaches.turn->phase(), Phase::kParked);
  EXPECT_EQ(attaches.turn->snapshot_limit, 9);
  EXPECT_FALSE(attaches.turn->no_snapshot);
  EXPECT_THAT(attaches.core.world.jobs, SizeIs(1)) << "the store is told";
  EXPECT_TRUE(attaches.turn->kind->IsOpen());
}

TEST(AttachingTest, BehindTheFirstSnapshotThereIsNone) {
  Attaches attaches(0);
  attaches.Answer(absl::NotFoundError("its records are gone"));
  EXPECT_TRUE(attaches.turn->no_snapshot);
  EXPECT_EQ(attaches.turn->snapshot_limit, UINT64_MAX);
}

TEST(AttachingTest, ASessionThatStandsOnASnapshotAloneCannotGoOnWithoutIt) {
  Attaches attaches(10);
  attaches.turn->session->base_position = 10;
  attaches.Answer(absl::DataLossError("its sums are wrong"));
  EXPECT_FALSE(attaches.turn->kind->IsOpen());
  EXPECT_EQ(attaches.turn->phase(), Phase::kComputed);
}

TEST(AttachingTest, AWarmSlotThatIsGoneIsNotLookedForAgain) {
  Attaches attaches(10, false);
  attaches.turn->warm_source = 3;
  attaches.Answer(absl::NotFoundError("another has the slot"));
  EXPECT_TRUE(attaches.turn->no_warm);
  EXPECT_EQ(attaches.turn->not_before, absl::InfinitePast());
  EXPECT_EQ(attaches.turn->phase(), Phase::kParked);
}

TEST(AttachingTest, AWorkerThatCannotIsAskedAgainLaterAndNotForEver) {
  Attaches attaches(0, false);
  for (int i = 1; attaches.turn->kind->IsOpen(); ++i) {
    ASSERT_LE(i, 100);
    attaches.Answer(absl::ResourceExhaustedError("no memory"));
    if (!attaches.turn->kind->IsOpen()) break;
    EXPECT_GT(attaches.turn->not_before, attaches.core.world.now);
    attaches.attaching.Admit(attaches.turn, 0);
  }
  EXPECT_EQ(attaches.turn->phase(), Phase::kComputed);
  EXPECT_THAT(attaches.core.turns.seated(), IsEmpty());
}

TEST(AttachingTest, WhatIsSaidOfASequenceThatIsGoneIsDropped) {
  Attaches attaches(10);
  v1::SequenceAttached attached;
  attached.set_sequence(attaches.turn->sequence + 1);
  attaches.attaching.OnAnswer(attached);
  EXPECT_EQ(attaches.turn->phase(), Phase::kAttaching);
}

}  // namespace
}  // namespace rwkv::router
