#include "services/router/scheduler/fair_share.h"

#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

// Serves the smallest counter of those with work, `tokens` at a time.
std::string Serve(FairShare& share, const std::vector<std::string>& with_work, double tokens = 1) {
  std::string next = with_work.front();
  for (const std::string& flow : with_work) {
    if (share.counter(flow) < share.counter(next)) next = flow;
  }
  share.Charge(next, tokens);
  return next;
}

TEST(FairShareTest, SharesAreAsWeights) {
  FairShare share;
  share.Begin("a", 3);
  share.Begin("b", 1);
  std::map<std::string, int> served;
  for (int i = 0; i < 400; ++i) ++served[Serve(share, {"a", "b"})];
  EXPECT_NEAR(served["a"], 300, 1);
  EXPECT_NEAR(served["b"], 100, 1);
}

TEST(FairShareTest, ManyPiecesOfWorkCountNoMoreThanOne) {
  FairShare share;
  share.Begin("quiet", 1);
  for (int i = 0; i < 1000; ++i) share.Begin("flood", 1);
  std::map<std::string, int> served;
  for (int i = 0; i < 100; ++i) ++served[Serve(share, {"quiet", "flood"})];
  EXPECT_EQ(served["quiet"], 50);
}

TEST(FairShareTest, BeingIdleEarnsNoCredit) {
  FairShare share;
  share.Begin("busy", 1);
  for (int i = 0; i < 1000; ++i) share.Charge("busy", 1);
  share.Begin("late", 1);  // Would be owed 1,000 tokens.
  std::map<std::string, int> served;
  for (int i = 0; i < 100; ++i) ++served[Serve(share, {"busy", "late"})];
  EXPECT_NEAR(served["late"], 50, 1);
  // Nor does coming and going all the time.
  int got = 0;
  for (int i = 0; i < 1000; ++i) {
    share.End("late");
    share.Begin("late", 1);
    got += Serve(share, {"busy", "late"}) == "late";
  }
  EXPECT_LE(got, 501);
}

TEST(FairShareTest, WhoeverComesWhenNobodyIsThereOwesNothingAndIsOwedNothing) {
  FairShare share;
  share.Begin("first", 1);
  for (int i = 0; i < 1000; ++i) share.Charge("first", 1);
  share.End("first");
  share.Begin("second", 1);
  share.Begin("first", 1);
  std::map<std::string, int> served;
  for (int i = 0; i < 100; ++i) ++served[Serve(share, {"first", "second"})];
  EXPECT_NEAR(served["first"], 50, 1);
}

TEST(FairShareTest, WhoWasServedTooMuchMakesUpForIt) {
  FairShare share;
  share.Begin("a", 1);
  share.Begin("b", 1);
  share.Charge("a", 10);  // A long chunk at once.
  std::string order;
  for (int i = 0; i < 12; ++i) order += Serve(share, {"a", "b"});
  EXPECT_EQ(order, "bbbbbbbbbbab");
}

TEST(FairShareTest, UnderRandomWorkNobodyWithWorkFallsBehindByMoreThanAGrant) {
  std::mt19937 random(7);  // NOLINT: the same every time.
  FairShare share;
  const std::vector<std::string> names = {"a", "b", "c", "d"};
  const std::vector<double> weights = {1, 2, 4, 0.5};
  std::map<std::string, int> work;
  share.Begin("a", 1);
  share.Begin("b", 2);
  work["a"] = work["b"] = 1;  // These two always have some.
  constexpr double kGrant = 32;
  double a = 0, b = 0;
  for (int i = 0; i < 20000; ++i) {
    const size_t other = 2 + random() % 2;
    const std::string& name = names[other];
    if (work[name] > 0 && random() % 2 == 0) {
      share.End(name);
      --work[name];
    } else {
      share.Begin(name, weights[other]);
      ++work[name];
    }
    std::vector<std::string> with_work;
    for (const auto& [flow, count] : work) {
      if (count > 0) with_work.push_back(flow);
    }
    const double tokens = 1 + random() % static_cast<int>(kGrant);
    const std::string served = Serve(share, with_work, tokens);
    if (served == "a") a += tokens;
    if (served == "b") b += tokens;
    ASSERT_LE(std::abs(a / 1 - b / 2), 1.5 * kGrant) << "after " << i;
  }
}

TEST(FairShareTest, FlowsThatAreGoneAreForgotten) {
  FairShare share;
  for (int i = 0; i < 100000; ++i) {
    const std::string flow = absl::StrCat("tenant-", i);
    share.Begin(flow, 1);
    share.Charge(flow, 1);
    share.End(flow);
  }
  EXPECT_LE(share.flows(), 2100u);
}

TEST(FairShareTest, WhoHasHadMoreThanOthersIsNotForgivenByLeaving) {
  FairShare share;
  share.Begin("greedy", 1);
  share.Begin("other", 1);
  share.Charge("greedy", 100);
  share.Charge("other", 10);
  share.End("greedy");
  share.Begin("greedy", 1);
  EXPECT_EQ(share.counter("greedy"), 100);
}

TEST(FairShareTest, WhoeverIsUnknownBeginsWhereTheOthersAre) {
  FairShare share;
  share.Begin("a", 1);
  share.Charge("a", 50);
  share.End("a");
  EXPECT_EQ(share.counter("nobody"), 50);
}

TEST(FairShareTest, NobodyIsForgottenWhoHasWorkOrHadMoreThanTheOthers) {
  FairShare share;
  share.Begin("works", 1);
  share.Begin("greedy", 1);
  share.Charge("greedy", 1000);
  share.End("greedy");
  for (int i = 0; i < 100; ++i) {
    const std::string name = absl::StrCat("other-", i);
    share.Begin(name, 1);
    share.Charge(name, 1);
    share.End(name);
  }
  EXPECT_EQ(share.counter("works"), 0);
  EXPECT_EQ(share.counter("greedy"), 1000);
}

}  // namespace
}  // namespace rwkv::router
