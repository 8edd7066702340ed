#include "services/worker/client/fake_worker.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::worker {
namespace {

using ::testing::HasSubstr;

class FakePipelineTest : public ::testing::Test {
 protected:
  FakePipelineTest() : pipeline_(FakePipeline::Options()) {}

  std::vector<std::unique_ptr<ExecuteStream>> Open(const std::string& router, const std::string& epoch) {
    std::vector<std::unique_ptr<ExecuteStream>> streams;
    for (int i = 0; i < 2; ++i) {
      streams.push_back(pipeline_.Connect(i)->Execute());
      v1::ExecuteRequest request;
      request.mutable_open()->set_router(router);
      request.mutable_open()->set_epoch(epoch);
      request.mutable_open()->set_stage_index(i);
      request.mutable_open()->set_stage_count(2);
      EXPECT_TRUE(streams[i]->Write(request).ok());
    }
    return streams;
  }

  void Attach(std::vector<std::unique_ptr<ExecuteStream>>& streams, int slot, uint64_t sequence) {
    v1::ExecuteRequest request;
    request.mutable_attach()->set_slot(slot);
    request.mutable_attach()->set_sequence(sequence);
    request.mutable_attach()->set_fresh(true);
    for (auto& stream : streams) {
      ASSERT_TRUE(stream->Write(request).ok());
      const absl::StatusOr<v1::ExecuteResponse> response = stream->Read();
      ASSERT_TRUE(response.ok()) << response.status();
      ASSERT_EQ(response->attached().status().code(), 0) << response->attached().status().message();
    }
  }

  v1::StepResult Step(std::vector<std::unique_ptr<ExecuteStream>>& streams, uint64_t id, uint64_t position,
                      std::vector<uint32_t> tokens) {
    v1::ExecuteRequest request;
    request.mutable_step()->set_step_id(id);
    v1::StepEntry* entry = request.mutable_step()->add_entries();
    entry->set_slot(3);
    entry->set_sequence(7);
    entry->set_expected_position(position);
    for (uint32_t token : tokens) entry->add_token_ids(token);
    entry->set_sample(true);
    for (auto& stream : streams) EXPECT_TRUE(stream->Write(request).ok());
    const absl::StatusOr<v1::ExecuteResponse> response = streams.back()->Read();
    EXPECT_TRUE(response.ok()) << response.status();
    return response.ok() ? response->step() : v1::StepResult();
  }

  void ExpectOpened(std::vector<std::unique_ptr<ExecuteStream>>& streams) {
    for (auto& stream : streams) {
      const absl::StatusOr<v1::ExecuteResponse> response = stream->Read();
      ASSERT_TRUE(response.ok()) << response.status();
      EXPECT_TRUE(response->has_opened());
    }
  }

  FakePipeline pipeline_;
};

TEST_F(FakePipelineTest, TokensDependOnTheLogAlone) {
  auto streams = Open("router-0", "e1");
  ExpectOpened(streams);
  Attach(streams, 3, 7);
  std::vector<uint32_t> log = {5, 6, 7};
  const std::vector<uint32_t> expected = FakeModel::Greedy(log, 3, 1000);
  std::vector<uint32_t> tokens;
  uint64_t position = 0;
  std::vector<uint32_t> next = log;
  for (uint64_t id = 1; id <= 3; ++id) {
    const v1::StepResult result = Step(streams, id, position, next);
    ASSERT_EQ(result.entries_size(), 1);
    ASSERT_EQ(result.entries(0).status().code(), 0) << result.entries(0).status().message();
    position += next.size();
    EXPECT_EQ(result.entries(0).position(), position);
    next = {result.entries(0).token_id()};
    tokens.push_back(next[0]);
  }
  EXPECT_EQ(tokens, expected);
}

TEST_F(FakePipelineTest, WrongPositionIsAborted) {
  auto streams = Open("router-0", "e1");
  ExpectOpened(streams);
  Attach(streams, 3, 7);
  const v1::StepResult result = Step(streams, 1, 4, {1});
  ASSERT_EQ(result.entries_size(), 1);
  EXPECT_EQ(result.entries(0).status().code(), static_cast<int>(absl::StatusCode::kAborted));
}

TEST_F(FakePipelineTest, SecondRouterIsRefusedAndTheSameRouterTakesOver) {
  auto streams = Open("router-0", "e1");
  ExpectOpened(streams);
  auto foreign = Open("router-1", "e2");
  const absl::StatusOr<v1::ExecuteResponse> refused = foreign[0]->Read();
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("router-0"));
  auto again = Open("router-0", "e3");
  EXPECT_EQ(streams[0]->Read().status().code(), absl::StatusCode::kUnavailable);
  ExpectOpened(again);
}

TEST_F(FakePipelineTest, AKilledWorkerEndsTheEpochOfAllStages) {
  auto streams = Open("router-0", "e1");
  ExpectOpened(streams);
  pipeline_.Kill(1);
  for (auto& stream : streams) EXPECT_EQ(stream->Read().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(pipeline_.Connect(1)->Describe(absl::Now() + absl::Seconds(30)).status().code(),
            absl::StatusCode::kUnavailable);
  pipeline_.Restart(1);
  auto again = Open("router-0", "e2");
  ExpectOpened(again);
}

}  // namespace
}  // namespace rwkv::worker
