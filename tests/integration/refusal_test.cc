// Models that do not go on, as real processes: an error that says so, the same each time it is asked for.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/common/grpc_status.h"
#include "services/router/client/router_client.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Gt;
using ::testing::HasSubstr;
using ::testing::Lt;
using ::testing::SizeIs;

struct Answer {
  absl::Status status;
  std::vector<uint32_t> tokens;
};

Answer Generate(RouterClient& client, const v1::GenerateRequest& request) {
  Answer answer;
  answer.status = client.Generate(request, [&](const v1::GenerateResponse& response) {
    if (response.has_token_id()) answer.tokens.push_back(response.token_id());
    return absl::OkStatus();
  });
  return answer;
}

v1::GenerateRequest Turn(const std::string& session, const std::string& request_id, int input, uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(request_id);
  for (int i = 0; i < input; ++i) request.mutable_tokens()->add_ids((i * i + 7 * i + 1) % 101);
  request.set_max_tokens(max_tokens);
  return request;
}

void CreateSession(RouterClient& client, const std::string& id) {
  v1::SessionsCreateRequest request;
  request.set_session_id(id);
  ASSERT_THAT(client.CreateSession(request), IsOk());
}

// A RWKV-5 model whose values are so large that its matrix state overflows after some dozens of tokens.
absl::Status WriteOverflowingModel(const std::string& path) {
  constexpr int kExponent = 119;
  testing::RandomModelOptions options;
  options.version = checkpoint::ModelVersion::k5_2;
  options.dtype = kernels::DType::kFloat32;
  absl::StatusOr<std::vector<testing::RawTensor>> tensors = testing::MakeRandomModel(options);
  if (!tensors.ok()) return tensors.status();
  for (testing::RawTensor& tensor : *tensors) {
    if (!absl::EndsWith(tensor.spec.name, "att.value.weight")) continue;
    for (size_t at = 0; at < tensor.data.size(); at += sizeof(float)) {
      float value;
      std::memcpy(&value, &tensor.data[at], sizeof(value));
      value = std::ldexp(value, kExponent);
      std::memcpy(&tensor.data[at], &value, sizeof(value));
    }
  }
  return testing::WriteFileAtomically(path, testing::SafetensorsBytes(*tensors));
}

TEST(RefusalTest, LogitsThatOverflowEndTheTurnForGood) {
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/overflow.safetensors");
  ASSERT_OK(WriteOverflowingModel(options.model));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  const auto is_overflow =
      StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("does not go on after"), HasSubstr("are not finite")));
  const Answer without_session = Generate(*client, Turn("", "", 10, 300));
  EXPECT_THAT(without_session.status, is_overflow);
  EXPECT_THAT(without_session.tokens, SizeIs(AllOf(Gt(5), Lt(300)))) << "the model does not overflow in the middle";

  CreateSession(*client, "s");
  for (int again = 0; again < 3; ++again) {
    SCOPED_TRACE(again);
    if (again == 2) {
      ASSERT_OK(cluster->Kill("router-0"));
      ASSERT_OK(cluster->Restart("router-0"));
      ASSERT_OK(cluster->WaitUntilServing());
    }
    const Answer answer = Generate(*client, Turn("s", "a", 10, 300));
    EXPECT_THAT(answer.status, is_overflow);
    EXPECT_EQ(answer.tokens, without_session.tokens);
  }
  // The state is spoiled, so the next turn fails too, at once; before the place the session is as good as any.
  EXPECT_THAT(Generate(*client, Turn("s", "b", 3, 10)).status, is_overflow);
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("s");
  rewind.set_position(10);
  ASSERT_THAT(client->RewindSession(rewind), IsOk());
  const Answer next = Generate(*client, Turn("s", "c", 3, 5));
  EXPECT_THAT(next.status, IsOk());
  EXPECT_THAT(next.tokens, SizeIs(5));
}

TEST(RefusalTest, ABoundedContextIsSaidAtTheDoor) {
  testing::RandomModelOptions model;
  model.version = checkpoint::ModelVersion::k7b;
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/bounded.safetensors");
  options.worker_flags = {"--deep_embed_context=64"};
  ASSERT_OK(testing::WriteRandomModel(model, options.model));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  ASSERT_OK_AND_ASSIGN(const v1::ListModelsResponse models, client->ListModels());
  EXPECT_EQ(models.models(0).max_context_tokens(), 64);
  const auto expect_refused = [](const absl::Status& status, const std::string& field) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("context of 64 tokens")));
    EXPECT_EQ(common::GetInvalidField(status), field);
  };
  expect_refused(Generate(*client, Turn("", "", 65, 0)).status, "tokens.ids");
  expect_refused(Generate(*client, Turn("", "", 60, 20)).status, "max_tokens");
  CreateSession(*client, "s");
  EXPECT_THAT(Generate(*client, Turn("s", "a", 30, 20)).tokens, SizeIs(20));
  expect_refused(Generate(*client, Turn("s", "b", 10, 20)).status, "max_tokens");
  EXPECT_THAT(Generate(*client, Turn("s", "b", 10, 4)).tokens, SizeIs(4));
  v1::EmbedRequest embed;
  *embed.mutable_tokens() = Turn("", "", 65, 0).tokens();
  expect_refused(client->Embed(embed).status(), "tokens.ids");
  v1::ScoreRequest score;
  *score.mutable_tokens() = Turn("", "", 66, 0).tokens();
  expect_refused(client->Score(score).status(), "tokens.ids");
  score.mutable_tokens()->mutable_ids()->RemoveLast();
  EXPECT_THAT(client->Score(score), IsOk());
}

}  // namespace
}  // namespace rwkv
