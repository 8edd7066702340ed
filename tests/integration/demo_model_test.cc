// The shipped demo model through the whole cluster says and scores what deploy/demo_model/evaluate.py, which is numpy
// and shares nothing with the cluster, says and scores.
#include <memory>
#include <numeric>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/client/router_client.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::Runfile;

class DemoModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    LocalCluster::Options options;
    options.model = Runfile("deploy/demo_model/rwkv7_demo.safetensors");
    options.router_flags = {absl::StrCat("--tokenizer=", Runfile("deploy/demo_model/rwkv7_demo.vocab.txt"))};
    ASSERT_OK_AND_ASSIGN(cluster_, LocalCluster::Start(options));
    client_ = MakeRouterClient(cluster_->Channel("router-0"));
  }

  // The end of text, id 0, as every document began in training, and the text's tokens.
  absl::StatusOr<v1::TokenList> Document(const std::string& text) {
    v1::TokenizeRequest request;
    request.set_data(text);
    absl::StatusOr<v1::TokenizeResponse> response = client_->Tokenize(request);
    if (!response.ok()) return response.status();
    v1::TokenList tokens;
    tokens.add_ids(0);
    tokens.mutable_ids()->MergeFrom(response->token_ids());
    return tokens;
  }

  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<RouterClient> client_;
};

TEST_F(DemoModelTest, AnswersAQuestionInItsTemplate) {
  v1::GenerateRequest request;
  ASSERT_OK_AND_ASSIGN(*request.mutable_tokens(), Document("User: What is a harbor?\n\nAssistant:"));
  request.set_max_tokens(60);
  request.add_stop("\n\n");
  request.mutable_sampling()->set_temperature(0);
  std::string answer;
  EXPECT_OK(client_->Generate(request, [&](const v1::GenerateResponse& response) {
    answer += response.text();
    return absl::OkStatus();
  }));
  EXPECT_EQ(answer, " A harbor is a sheltered port where ships can take on or discharge cargo.");
}

TEST_F(DemoModelTest, ScoresTextAsItsEvaluationDoes) {
  v1::ScoreRequest request;
  ASSERT_OK_AND_ASSIGN(
      *request.mutable_tokens(),
      Document("The boat came into the harbor at night. An old man stood on the quay with a lantern in his hand, and "
               "when he saw us he called out that there was soup on the fire and a bed for each of us. We were glad of "
               "it, for the wind had been cold all day."));
  ASSERT_OK_AND_ASSIGN(const v1::ScoreResponse response, client_->Score(request));
  EXPECT_EQ(response.logprobs_size(), 67);
  EXPECT_NEAR(std::accumulate(response.logprobs().begin(), response.logprobs().end(), 0.0), -214.6267, 0.01);
}

}  // namespace
}  // namespace rwkv
