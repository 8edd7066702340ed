#include "services/router/pipeline/assembly.h"

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// Workers, and routers that look at them: who opens a chain gets those of its workers that nobody drives.
class World {
 public:
  void Add(int first, int end, int layers = 4, const std::string& fingerprint = "f", const std::string& family = "") {
    v1::DescribeResponse& said = said_.emplace_back();
    said.mutable_model()->set_fingerprint(fingerprint);
    said.mutable_model()->set_layer_count(layers);
    said.set_numeric_family(family);
    said.set_first_layer(first);
    said.set_end_layer(end);
    answers_.push_back(true);
  }
  void AddRouter(const std::string& name) { routers_.emplace(name, Assembly(name)); }
  void RemoveRouter(const std::string& name) {
    routers_.erase(name);
    for (v1::DescribeResponse& said : said_) {
      if (said.driven_by() == name) Free(said);
    }
  }
  void Lose(int worker) { EndLaneOf(worker), answers_[worker] = false; }
  void Return(int worker) { answers_[worker] = true; }
  v1::DescribeResponse& said(int worker) { return said_[worker]; }

  Assembly::Decision Look(const std::string& router) {
    std::vector<SeenWorker> workers;
    std::map<uint64_t, OwnLane> own;
    for (size_t i = 0; i < said_.size(); ++i) {
      SeenWorker& worker = workers.emplace_back();
      worker.address = absl::StrCat("worker-", i);
      worker.said = &said_[i];
      worker.answers = answers_[i];
      if (said_[i].driven_by() != router || dead_.count(said_[i].epoch()) > 0) continue;
      worker.lane = std::stoull(said_[i].epoch());
      own[worker.lane].id = worker.lane;
      own[worker.lane].kind = PipelineKind(said_[i]);
      own[worker.lane].turns = turns_[worker.lane];
    }
    std::vector<OwnLane> lanes;
    for (const auto& [id, lane] : own) lanes.push_back(lane);
    std::vector<std::string> names;
    for (const auto& [name, assembly] : routers_) names.push_back(name);
    return routers_.at(router).Decide(workers, lanes, names, now_);
  }

  // A router looks and does what it decides.
  void Act(const std::string& router) {
    const Assembly::Decision decision = Look(router);
    for (const std::vector<int>& chain : decision.open) Open(router, chain);
    for (const uint64_t lane : decision.give_away) EndLane(lane);
  }
  bool Open(const std::string& router, const std::vector<int>& chain) {
    for (const int i : chain) {
      if (!said_[i].driven_by().empty() && said_[i].driven_by() != router) return false;
    }
    const std::string epoch = absl::StrCat(next_lane_++);
    for (const int i : chain) said_[i].set_driven_by(router), said_[i].set_epoch(epoch);
    return true;
  }
  void EndLane(uint64_t lane) {
    for (v1::DescribeResponse& said : said_) {
      if (said.epoch() == absl::StrCat(lane)) Free(said);
    }
  }
  void EndLaneOf(int worker) {
    if (!said_[worker].epoch().empty()) EndLane(std::stoull(said_[worker].epoch()));
  }
  void Pass(absl::Duration duration) { now_ += duration; }

  // Lanes by router.
  std::map<std::string, int> Lanes() const {
    std::map<std::string, std::set<std::string>> epochs;
    for (const v1::DescribeResponse& said : said_) {
      if (!said.driven_by().empty()) epochs[said.driven_by()].insert(said.epoch());
    }
    std::map<std::string, int> lanes;
    for (const auto& [router, of_router] : epochs) lanes[router] = static_cast<int>(of_router.size());
    return lanes;
  }

  std::map<std::string, Assembly> routers_;
  std::map<uint64_t, int> turns_;

 private:
  static void Free(v1::DescribeResponse& said) { said.clear_driven_by(), said.clear_epoch(); }

  std::deque<v1::DescribeResponse> said_;
  std::vector<bool> answers_;
  std::set<std::string> dead_;
  absl::Time now_ = absl::FromUnixSeconds(1);
  uint64_t next_lane_ = 1;
};

World TwoStages(int pipelines) {
  World world;
  for (int i = 0; i < pipelines; ++i) world.Add(0, 2), world.Add(2, 4);
  return world;
}

TEST(AssemblyTest, OneRouterTakesAllLanesAndLeavesSpares) {
  World world = TwoStages(2);
  world.Add(2, 4);
  world.AddRouter("r0");
  world.Act("r0");
  EXPECT_EQ(world.Lanes()["r0"], 2);
  EXPECT_THAT(world.Look("r0").open, IsEmpty());
}

TEST(AssemblyTest, ASpareTakesALostWorkersPlaceAtOnce) {
  World world = TwoStages(1);
  world.Add(2, 4);
  world.AddRouter("r0");
  world.Act("r0");
  const int used = world.said(1).driven_by().empty() ? 2 : 1;
  world.Lose(used);
  EXPECT_THAT(world.Look("r0").open, ElementsAre(ElementsAre(0, 3 - used)));
}

TEST(AssemblyTest, WorkersOfDifferentKindsMakeNoLane) {
  for (const auto& [fingerprint, family] : {std::make_pair("other", ""), std::make_pair("f", "fast")}) {
    World world;
    world.Add(0, 2);
    world.Add(2, 4, 4, fingerprint, family);
    world.AddRouter("r0");
    EXPECT_THAT(world.Look("r0").open, IsEmpty()) << fingerprint << family;
    EXPECT_TRUE(world.Look("r0").wants_more);
  }
}

TEST(AssemblyTest, LayersOfDifferentCutsAreJoinedWhereTheyFit) {
  World world;
  world.Add(0, 1, 6), world.Add(0, 3, 6), world.Add(1, 3, 6), world.Add(2, 6, 6), world.Add(3, 6, 6);
  world.AddRouter("r0");
  const Assembly::Decision decision = world.Look("r0");
  EXPECT_THAT(decision.open, ElementsAre(ElementsAre(1, 4)));
  world.Lose(1);
  EXPECT_THAT(world.Look("r0").open, ElementsAre(ElementsAre(0, 2, 4)));
}

TEST(AssemblyTest, ADrainingOrSilentWorkerIsLeftOut) {
  World world = TwoStages(1);
  world.AddRouter("r0");
  world.said(1).set_draining(true);
  EXPECT_THAT(world.Look("r0").open, IsEmpty());
  world.said(1).set_draining(false);
  world.Lose(0);
  EXPECT_THAT(world.Look("r0").open, IsEmpty());
}

TEST(AssemblyTest, WhatASilentRouterDrivesIsTaken) {
  World world = TwoStages(1);
  world.AddRouter("r0");
  world.said(0).set_driven_by("gone"), world.said(1).set_driven_by("gone");
  EXPECT_THAT(world.Look("r0").open, IsEmpty());
  world.said(0).set_driver_is_silent(true), world.said(1).set_driver_is_silent(true);
  EXPECT_THAT(world.Look("r0").open, SizeIs(1));
}

TEST(AssemblyTest, AnEarlierIncarnationsWorkersAreTakenOver) {
  World world = TwoStages(1);
  world.AddRouter("r0");
  std::vector<SeenWorker> workers;
  world.said(0).set_driven_by("r0");
  world.said(1).set_driven_by("r0");
  for (int i = 0; i < 2; ++i) workers.push_back({"", &world.said(i), true, 0});
  EXPECT_THAT(world.routers_.at("r0").Decide(workers, {}, {}, absl::UnixEpoch()).open, SizeIs(1));
}

TEST(AssemblyTest, TheLaneWithTheFewestTurnsIsGivenToARouterThatComes) {
  World world = TwoStages(4);
  world.AddRouter("r0");
  world.Act("r0");
  for (uint64_t lane = 1; lane <= 4; ++lane) world.turns_[lane] = lane == 3 ? 0 : 5;
  world.AddRouter("r1");
  EXPECT_THAT(world.Look("r1").open, IsEmpty());
  EXPECT_THAT(world.Look("r0").give_away, ElementsAre(3));
  EXPECT_THAT(world.Look("r0").give_away, IsEmpty()) << "one after the other";
}

TEST(AssemblyTest, WhatOthersLeaveLyingIsTakenWithinTwoSecondsAndKept) {
  World world = TwoStages(2);
  world.AddRouter("r0");
  world.Act("r0");
  world.AddRouter("dead");  // Wants its share and never takes it.
  world.Act("r0");
  EXPECT_EQ(world.Lanes()["r0"], 1);
  world.Act("r0");
  world.Pass(absl::Seconds(2));
  world.Act("r0");
  EXPECT_EQ(world.Lanes()["r0"], 2);
  world.Pass(absl::Seconds(5));
  EXPECT_THAT(world.Look("r0").give_away, IsEmpty()) << "it would come back";
}

// Whoever looks when, and whoever comes and goes: soon each lane has one driver, and nobody has two more than another.
TEST(AssemblyTest, LanesAreSharedOutFairlyWheneverRoutersComeAndGo) {
  for (int seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const int lanes = 1 + random() % 7;
    World world = TwoStages(lanes);
    std::vector<std::string> routers;
    for (int change = 0; change < 6; ++change) {
      if (routers.empty() || random() % 2 == 0) {
        routers.push_back(absl::StrCat("r", change));
        world.AddRouter(routers.back());
      } else {
        const size_t i = random() % routers.size();
        world.RemoveRouter(routers[i]);
        routers.erase(routers.begin() + i);
      }
      if (random() % 2 == 0) {
        const int worker = static_cast<int>(random() % (2 * lanes));
        world.Lose(worker);
        world.Return(worker);
      }
      int lying = 0;  // Rounds since the last with a driver for each lane.
      for (int round = 0; round < 60 && !routers.empty(); ++round) {
        std::shuffle(routers.begin(), routers.end(), random);
        for (const std::string& router : routers) world.Act(router);
        world.Pass(absl::Milliseconds(500));
        int driven = 0;
        for (const auto& [router, count] : world.Lanes()) driven += count;
        lying = driven < lanes ? lying + 1 : 0;
        ASSERT_LE(lying, 4) << "seed " << seed << ": a lane lies around for more than two seconds";
      }
      std::map<std::string, int> share = world.Lanes();
      int total = 0, most = 0, least = lanes;
      for (const std::string& router : routers) {
        total += share[router];
        most = std::max(most, share[router]);
        least = std::min(least, share[router]);
      }
      if (routers.empty()) continue;
      ASSERT_EQ(total, lanes) << "seed " << seed;
      ASSERT_LE(most - least, 1) << "seed " << seed << ", change " << change;
    }
  }
}

}  // namespace
}  // namespace rwkv::router
