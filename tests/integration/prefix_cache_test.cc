// A beginning that many inputs share is read once in the whole cluster: also for another router, on another pipeline,
// and after whoever read it was killed. Real processes.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::WaitUntil;

constexpr uint32_t kSystem = 2000;
constexpr uint32_t kVocabulary = 101;

struct Answer {
  grpc::Status status;
  std::vector<uint32_t> tokens;
  v1::Finish finish;
};

v1::GenerateRequest Request(uint32_t own) {
  v1::GenerateRequest request;
  for (uint32_t i = 0; i < kSystem; ++i) request.mutable_tokens()->add_ids((i * i * 7 + i) % kVocabulary);
  for (uint32_t i = 0; i < 12; ++i) request.mutable_tokens()->add_ids((own * 31 + i) % kVocabulary);
  request.set_max_tokens(20);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(own);
  request.set_ignore_end_of_text(true);
  return request;
}

Answer Generate(const LocalCluster& cluster, const std::string& router, const v1::GenerateRequest& request) {
  const auto stub = v1::Generation::NewStub(cluster.Channel(router));
  Answer answer;
  const auto try_once = [&] {
    answer = Answer();
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    const auto reader = stub->Generate(&context, request);
    for (v1::GenerateResponse response; reader->Read(&response);) {
      if (response.has_token_id()) answer.tokens.push_back(response.token_id());
      if (response.has_finish()) answer.finish = response.finish();
    }
    answer.status = reader->Finish();
    return answer.status.error_code() != grpc::StatusCode::UNAVAILABLE;
  };
  EXPECT_TRUE(WaitUntil(try_once));  // A router that has just lost its pipeline says so.
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  return answer;
}

// What the same cluster answers without the cache.
std::vector<std::vector<uint32_t>> Undisturbed(LocalCluster::Options options, uint32_t count) {
  options.pipelines = options.routers = 1;
  options.router_flags = {"--prefix_cache=false"};
  std::vector<std::vector<uint32_t>> answers;
  const auto cluster = LocalCluster::Start(options);
  EXPECT_THAT(cluster, IsOk());
  if (!cluster.ok()) return answers;
  for (uint32_t own = 0; own < count; ++own) {
    const Answer answer = Generate(**cluster, "router-0", Request(own));
    EXPECT_EQ(answer.finish.reused_tokens(), 0);
    answers.push_back(answer.tokens);
  }
  return answers;
}

TEST(PrefixCacheTest, AnyRouterAndPipelineBeginWithWhatOneHasRead) {
  testing::RandomModelOptions model;
  model.layers = 4;
  model.vocab_size = kVocabulary;
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/prefix.safetensors");
  ASSERT_OK(testing::WriteRandomModel(model, options.model));
  options.worker_flags = {"--slots=4", "--threads=1"};
  const std::vector<std::vector<uint32_t>> expected = Undisturbed(options, 6);
  ASSERT_EQ(expected.size(), 6);

  options.pipelines = 2;
  options.routers = 2;
  auto started = LocalCluster::Start(options);
  ASSERT_THAT(started, IsOk());
  LocalCluster& cluster = **started;
  const auto marked = [](uint32_t own) {
    v1::GenerateRequest request = Request(own);
    request.add_prefix_ends(kSystem);
    return request;
  };
  const Answer first = Generate(cluster, "router-0", marked(0));
  EXPECT_EQ(first.tokens, expected[0]);
  EXPECT_EQ(first.finish.reused_tokens(), 0);
  // Each router drives a pipeline: the other one has it from the store. It is there shortly after the answer.
  Answer second;
  ASSERT_TRUE(WaitUntil([&] {
    second = Generate(cluster, "router-1", marked(1));
    EXPECT_EQ(second.tokens, expected[1]);
    return second.finish.reused_tokens() >= kSystem;
  }));
  const Answer third = Generate(cluster, "router-0", marked(2));
  EXPECT_EQ(third.tokens, expected[2]);
  EXPECT_EQ(third.finish.reused_tokens(), kSystem);
  // One that marks nothing finds it as well.
  const Answer fourth = Generate(cluster, "router-1", Request(3));
  EXPECT_EQ(fourth.tokens, expected[3]);
  EXPECT_EQ(fourth.finish.reused_tokens(), kSystem);

  // Whoever has it in memory dies.
  for (const std::string& worker : cluster.Names("worker")) ASSERT_THAT(cluster.Kill(worker), IsOk());
  ASSERT_THAT(cluster.RestartAll(), IsOk());
  ASSERT_THAT(cluster.WaitUntilServing(), IsOk());
  const Answer fifth = Generate(cluster, "router-0", Request(4));
  EXPECT_EQ(fifth.tokens, expected[4]);
  EXPECT_EQ(fifth.finish.reused_tokens(), kSystem);

  // So do the routers and the store.
  ASSERT_THAT(cluster.KillAll(), IsOk());
  ASSERT_THAT(cluster.RestartAll(), IsOk());
  ASSERT_THAT(cluster.WaitUntilServing(), IsOk());
  const Answer sixth = Generate(cluster, "router-1", Request(5));
  EXPECT_EQ(sixth.tokens, expected[5]);
  EXPECT_EQ(sixth.finish.reused_tokens(), kSystem);
}

}  // namespace
}  // namespace rwkv
