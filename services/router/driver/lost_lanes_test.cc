// Lanes that are lost: who waits for whom.
#include <cstdint>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/driver/lanes_testing.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::router {
namespace {

using worker::FakeModel;

// Two turns and one slot.
std::vector<FakeCluster::Call> LoseOneOfTwoLanes(FakeCluster& cluster) {
  EXPECT_TRUE(WaitForLanes(cluster.router(), 2));
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 2; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 300)));
  EXPECT_TRUE(WaitUntil(
      [&] { return cluster.pipeline(0).stats().slots_used == 1 && cluster.pipeline(1).stats().slots_used == 1; }));
  cluster.pipeline(1).Kill(0);
  EXPECT_TRUE(WaitForLanes(cluster.router(), 1));
  return calls;
}

// One step at a time, so that it is seen who is over before whom.
void ExpectThirdIsLast(FakeCluster& cluster, const std::vector<FakeCluster::Call>& calls) {
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline(0).AllowSteps(1);
    return calls[0].stream->closed() && calls[1].stream->closed();
  }));
  EXPECT_LT(calls[2].stream->received().size(), 20);
  cluster.pipeline(0).ResumeSteps();
  EXPECT_EQ(cluster.Finish(calls[2]).tokens, FakeModel::Greedy(Prompt(2), 300, kVocabulary));
}

TEST(LostLanesTest, WhoLostItsLaneTakesTurnsWithThoseOfAnother) {
  TurnManager::Options options = Router("router-0");
  options.slot_quantum = absl::Milliseconds(1);
  FakeCluster cluster(Named("a", 1), options, nullptr, {Named("b", 1)});
  const std::vector<FakeCluster::Call> calls = LoseOneOfTwoLanes(cluster);
  ASSERT_TRUE(WaitUntil([&] {
    cluster.pipeline(0).AllowSteps(1);
    return calls[0].stream->received().size() >= 20 && calls[1].stream->received().size() >= 20;
  }));
  for (const FakeCluster::Call& call : calls) EXPECT_FALSE(call.stream->closed()) << "the other waited for its end";
  cluster.pipeline(0).ResumeSteps();
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(cluster.Finish(calls[i]).tokens, FakeModel::Greedy(Prompt(i), 300, kVocabulary));
  }
}

TEST(LostLanesTest, WhoLostItsLaneAndFoundNoSlotGoesOnOnTheNextThatComesUp) {
  TurnManager::Options options = Router("router-0");
  options.slot_quantum = absl::Hours(1);
  FakeCluster cluster(Named("a", 1), options, nullptr, {Named("b", 1)});
  const std::vector<FakeCluster::Call> calls = LoseOneOfTwoLanes(cluster);
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  EXPECT_EQ(cluster.router().counts().running, 2);
  cluster.pipeline(1).ResumeSteps();
  cluster.pipeline(1).Restart(0);
  EXPECT_TRUE(WaitUntil([&] { return calls[0].stream->closed() || calls[1].stream->closed(); }));
  EXPECT_EQ(cluster.router().counts().waiting, 0);
  cluster.pipeline(0).ResumeSteps();
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(cluster.Finish(calls[i]).tokens, FakeModel::Greedy(Prompt(i), 300, kVocabulary));
  }
}

TEST(LostLanesTest, WhoLostItsLaneIsAheadOfThoseThatCameLater) {
  TurnManager::Options options = Router("router-0");
  options.slot_quantum = absl::Hours(1);
  FakeCluster cluster(Named("a", 1), options, nullptr, {Named("b", 1)});
  std::vector<FakeCluster::Call> calls = LoseOneOfTwoLanes(cluster);
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 1; }));
  calls.push_back(cluster.Start(Request(Prompt(2), 300)));
  EXPECT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 2; }));
  ExpectThirdIsLast(cluster, calls);
}

TEST(LostLanesTest, WhoLostItsLaneIsAheadOfThoseThatWaitedAlready) {
  TurnManager::Options options = Router("router-0");
  options.slot_quantum = absl::Hours(1);
  FakeCluster cluster(Named("a", 1), options, nullptr, {Named("b", 1)});
  ASSERT_TRUE(WaitForLanes(cluster.router(), 2));
  for (int i = 0; i < 2; ++i) cluster.pipeline(i).PauseSteps();
  std::vector<FakeCluster::Call> calls;
  for (uint32_t i = 0; i < 3; ++i) calls.push_back(cluster.Start(Request(Prompt(i), 300)));
  ASSERT_TRUE(WaitUntil([&] {
    return cluster.pipeline(0).stats().slots_used == 1 && cluster.pipeline(1).stats().slots_used == 1 &&
           cluster.router().counts().waiting == 1;
  }));
  cluster.pipeline(1).Kill(0);
  ASSERT_TRUE(WaitUntil([&] { return cluster.router().counts().waiting == 2; }));
  ExpectThirdIsLast(cluster, calls);
}

}  // namespace
}  // namespace rwkv::router
