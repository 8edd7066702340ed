#include "services/router/core/turn_commits.h"

#include <memory>
#include <string>
#include <vector>

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
using ::testing::SizeIs;

absl::Time Limit() { return absl::Now() + absl::Seconds(60); }

// Turns that the store knows, each of a session of its own.
struct Commits {
  static TurnOptions Options() {
    TurnOptions options;
    options.router = "router-0";
    options.incarnation = "1";
    options.lease_ttl = absl::Seconds(15);
    return options;
  }
  TurnPtr Begin(const std::string& id, std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>()) {
    v1::CreateSessionRequest create;
    create.set_session_id(id);
    EXPECT_THAT(store->CreateSession(create, Limit()), IsOk());
    const TurnPtr turn = core.Start(Phase::kComputed, "", id, std::move(stream));
    turn->request_id = "a";
    turn->session->lease = store->AcquireLease(core.sessions.AcquireRequest(id), Limit()).value().lease();
    turn->session->leased = true;
    v1::BeginTurnRequest begin;
    *begin.mutable_lease() = turn->session->lease;
    begin.set_request_id("a");
    begin.mutable_token_ids()->Add(turn->prompt.begin(), turn->prompt.end());
    begin.set_model_fingerprint("f");
    EXPECT_THAT(store->BeginTurn(begin, Limit()), IsOk());
    return turn;
  }
  void Draw(const TurnPtr& turn) {
    turn->answer->Push(5, 0, {});
    commits.Look(*turn);
  }
  // Its first tokens.
  std::vector<uint32_t> Log(const std::string& id, uint64_t length) {
    v1::ReadTokensRequest read;
    read.set_session_id(id);
    read.set_end(length);
    return store->ReadTokens(read, Limit()).value();
  }

  rwkv::testing::FakeClock clock;
  std::unique_ptr<state_store::FakeStateStore> store = *state_store::FakeStateStore::Create(&clock);
  CoreParts core{Options(), 2, store.get()};
  TurnCommits commits{core.context, core.turns, core.placement, &core.saves, &core.slots, &core.ends};
};

TEST(TurnCommitsTest, NewTokensOfAllTurnsGoIntoTheLogTogether) {
  Commits all;
  const TurnPtr a = all.Begin("a"), b = all.Begin("b");
  all.Draw(a);
  all.Draw(b);
  all.Draw(b);
  all.commits.Sweep();
  EXPECT_THAT(all.core.world.jobs, SizeIs(1));
  EXPECT_TRUE(a->committing);
  EXPECT_EQ(a->durable, 0) << "not before the store says so";
  all.core.world.RunJobs();
  EXPECT_EQ(a->durable, 1);
  EXPECT_EQ(b->durable, 2);
  EXPECT_EQ(b->session->durable_length, 5);
  EXPECT_THAT(all.Log("b", 5), ElementsAre(1, 2, 3, 5, 5));
  EXPECT_FALSE(a->committing);
}

TEST(TurnCommitsTest, OneCommitIsOnItsWayAtATime) {
  Commits all;
  const TurnPtr turn = all.Begin("a");
  all.Draw(turn);
  all.commits.Sweep();
  all.Draw(turn);
  all.commits.Sweep();
  EXPECT_THAT(all.core.world.jobs, SizeIs(1));
  all.core.world.RunJobs();
  EXPECT_EQ(turn->durable, 1);
  all.commits.Look(*turn);
  all.commits.Sweep();
  all.core.world.RunJobs();
  EXPECT_EQ(turn->durable, 2);
  all.commits.Look(*turn);
  all.commits.Sweep();
  EXPECT_THAT(all.core.world.jobs, IsEmpty()) << "nothing is left";
}

TEST(TurnCommitsTest, TheEndIsCommittedToo) {
  Commits all;
  const TurnPtr turn = all.Begin("a");
  turn->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  all.commits.Look(*turn);
  all.commits.Sweep();
  EXPECT_FALSE(turn->IsCommitted());
  all.core.world.RunJobs();
  EXPECT_TRUE(turn->finish_durable);
  EXPECT_TRUE(turn->IsCommitted());
}

TEST(TurnCommitsTest, NothingIsWrittenWithoutTheLease) {
  Commits all;
  const TurnPtr turn = all.Begin("a");
  turn->session->leased = false;
  all.Draw(turn);
  all.commits.Sweep();
  EXPECT_THAT(all.core.world.jobs, IsEmpty());
}

// Law T1: what is not in the log has never been.
TEST(TurnCommitsTest, WhatTheStoreRefusesIsForgotten) {
  Commits all;
  const auto stream = std::make_shared<HeldStream>();
  const TurnPtr turn = all.Begin("a", stream);
  all.clock.Advance(absl::Seconds(16));
  v1::AcquireLeaseRequest acquire = all.core.sessions.AcquireRequest("a");
  acquire.set_holder("router-1");
  ASSERT_THAT(all.store->AcquireLease(acquire, Limit()), IsOk());
  all.Draw(turn);
  all.commits.Sweep();
  all.core.world.RunJobs();
  EXPECT_EQ(turn->durable, 0);
  EXPECT_TRUE(turn->abandoned);
  EXPECT_TRUE(turn->session->stale);
  EXPECT_THAT(stream->closed, ElementsAre(StatusIs(absl::StatusCode::kAborted)));
  EXPECT_TRUE(turn->IsCommitted()) << "nothing of it will be";
  EXPECT_THAT(all.Log("a", 3), ElementsAre(1, 2, 3));
}

TEST(TurnCommitsTest, ATurnWhoseLeaseIsLostIsLeftToWhoHasIt) {
  Commits all;
  const auto stream = std::make_shared<HeldStream>();
  const TurnPtr turn = all.Begin("a", stream);
  all.commits.OnLeaseLost(*turn->session);
  EXPECT_TRUE(turn->abandoned);
  EXPECT_THAT(stream->closed, ElementsAre(StatusIs(absl::StatusCode::kAborted)));
}

}  // namespace
}  // namespace rwkv::router
