#include "services/router/pipeline/stage_plan.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::pair<std::string, v1::DescribeResponse> Worker(const std::string& address, int begin, int end) {
  v1::DescribeResponse worker;
  worker.mutable_model()->set_name("tiny");
  worker.mutable_model()->set_fingerprint("aaaa");
  worker.mutable_model()->set_layer_count(6);
  worker.mutable_model()->set_vocab_size(100);
  worker.set_first_layer(begin);
  worker.set_end_layer(end);
  worker.set_slots(8);
  worker.set_max_batch_tokens(64);
  v1::StateTensor* tensor = worker.add_state_layout();
  tensor->set_name("att.state");
  tensor->add_shape(2);
  return {address, worker};
}

TEST(StagePlanTest, OrdersWorkersByTheirLayers) {
  auto workers = std::vector{Worker("c:3", 4, 6), Worker("a:1", 0, 1), Worker("b:2", 1, 4)};
  workers[0].second.set_slots(3);  // Of the last stage.
  workers[2].second.set_max_batch_tokens(16);
  const absl::StatusOr<StagePlan> plan = MakeStagePlan(workers);
  ASSERT_THAT(plan.status(), IsOk());
  ASSERT_EQ(plan->stages.size(), 3);
  EXPECT_EQ(plan->stages[0].address, "a:1");
  EXPECT_EQ(plan->stages[0].worker_index, 1);
  EXPECT_EQ(plan->stages[2].address, "c:3");
  EXPECT_EQ(plan->slots, 3);
  EXPECT_EQ(plan->max_batch_rows, 16);
  EXPECT_EQ(plan->state_layout.size(), 1);
}

TEST(StagePlanTest, TheShortestContextCounts) {
  auto workers = std::vector{Worker("a:1", 0, 1), Worker("b:2", 1, 4), Worker("c:3", 4, 6)};
  EXPECT_EQ(MakeStagePlan(workers)->model.max_context_tokens(), 0);
  workers[1].second.set_max_context_tokens(4096);
  EXPECT_EQ(MakeStagePlan(workers)->model.max_context_tokens(), 4096);
  workers[2].second.set_max_context_tokens(100);
  EXPECT_EQ(MakeStagePlan(workers)->model.max_context_tokens(), 100);
}

TEST(StagePlanTest, OverlapNamesBothWorkersAndTheirLayers) {
  EXPECT_THAT(MakeStagePlan({Worker("a:1", 0, 4), Worker("b:2", 3, 6)}).status(),
              StatusIs(absl::StatusCode::kUnavailable,
                       AllOf(HasSubstr("overlap"), HasSubstr("a:1 (layers 0:4)"), HasSubstr("b:2 (layers 3:6)"))));
}

TEST(StagePlanTest, TheSameLayersTwiceOverlap) {
  EXPECT_THAT(MakeStagePlan({Worker("a:1", 0, 6), Worker("b:2", 0, 6)}).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("overlap")));
}

TEST(StagePlanTest, MissingLayersAreNamed) {
  EXPECT_THAT(MakeStagePlan({Worker("a:1", 0, 2), Worker("b:2", 4, 6)}).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("layers 2:4 are missing")));
  EXPECT_THAT(MakeStagePlan({Worker("b:2", 4, 6)}).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("layers 0:4 are missing")));
  EXPECT_THAT(MakeStagePlan({Worker("a:1", 0, 2)}).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("layers 2:6 are missing")));
}

TEST(StagePlanTest, TwoModelsNameBothFingerprints) {
  auto workers = std::vector{Worker("a:1", 0, 2), Worker("b:2", 2, 6)};
  workers[1].second.mutable_model()->set_fingerprint("bbbb");
  EXPECT_THAT(MakeStagePlan(workers).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("a:1"), HasSubstr("aaaa"), HasSubstr("b:2"), HasSubstr("bbbb"))));
}

TEST(StagePlanTest, TwoStateLayoutsAreRefused) {
  auto workers = std::vector{Worker("a:1", 0, 2), Worker("b:2", 2, 6)};
  workers[1].second.mutable_state_layout(0)->set_shape(0, 3);
  EXPECT_THAT(MakeStagePlan(workers).status(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                        AllOf(HasSubstr("att.state[2]"), HasSubstr("att.state[3]"))));
}

TEST(StagePlanTest, TwoListsOfTunedStatesAreRefused) {
  auto workers = std::vector{Worker("a:1", 0, 2), Worker("b:2", 2, 6)};
  for (auto& [address, worker] : workers) worker.mutable_model()->add_initial_states("poet@12345678");
  EXPECT_THAT(MakeStagePlan(workers).status(), IsOk());
  workers[1].second.mutable_model()->set_initial_states(0, "poet@00000000");
  EXPECT_THAT(MakeStagePlan(workers).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("a:1 has poet@12345678"), HasSubstr("b:2 has poet@00000000"))));
  workers[1].second.mutable_model()->clear_initial_states();
  EXPECT_THAT(MakeStagePlan(workers).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("b:2 has none")));
}

TEST(StagePlanTest, TwoNumericFamiliesAreRefused) {
  auto workers = std::vector{Worker("a:1", 0, 2), Worker("b:2", 2, 6)};
  for (auto& [address, worker] : workers) worker.set_numeric_family("fp32");
  EXPECT_THAT(MakeStagePlan(workers).status(), IsOk());
  workers[1].second.set_numeric_family("amx");
  workers[1].second.set_kernels("cpu/amx");
  EXPECT_THAT(MakeStagePlan(workers).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("a:1"), HasSubstr("fp32"), HasSubstr("b:2 (kernels cpu/amx"))));
}

TEST(StagePlanTest, AWorkerThatDrainsIsUnavailable) {
  auto workers = std::vector{Worker("a:1", 0, 6)};
  workers[0].second.set_draining(true);
  EXPECT_THAT(MakeStagePlan(workers).status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("a:1 drains")));
}

TEST(StagePlanTest, NonsenseIsRefused) {
  EXPECT_THAT(MakeStagePlan({}).status(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no workers")));
  EXPECT_THAT(MakeStagePlan({Worker("a:1", 3, 3)}).status(), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(MakeStagePlan({Worker("a:1", 0, 7)}).status(), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(MakeStagePlan({Worker("a:1", -1, 6)}).status(), StatusIs(absl::StatusCode::kFailedPrecondition));
  auto no_slots = Worker("a:1", 0, 6);
  no_slots.second.set_slots(0);
  EXPECT_THAT(MakeStagePlan({no_slots}).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("0 slots")));
  EXPECT_THAT(MakeStagePlan({{"a:1", v1::DescribeResponse()}}).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("which model")));
}

}  // namespace
}  // namespace rwkv::router
