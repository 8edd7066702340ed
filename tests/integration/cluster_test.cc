// The whole cluster as real processes: what it says depends neither on the number of stages nor on who was killed.
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/health.h"
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
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::LocalCluster;
using ::testing::Each;
using ::testing::ElementsAreArray;
using ::testing::Not;
using ::testing::SizeIs;

using Tokens = std::vector<uint32_t>;
using Rows = std::string;  // fp32 logits, as they came.

const Tokens kPrompt = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 93, 23};
const Tokens kSecondPrompt = {84, 62, 64, 33};

// A model of four layers, so that three stages get unequal shares. Written once for all tests.
std::string ModelPath() {
  static const std::string* const path = [] {
    testing::RandomModelOptions options;
    options.layers = 4;
    options.vocab_size = 101;
    auto* path = new std::string(absl::StrCat(::testing::TempDir(), "/integration.safetensors"));
    const absl::Status status = testing::WriteRandomModel(options, *path);
    if (!status.ok()) ADD_FAILURE() << status;
    return path;
  }();
  return *path;
}

// The same model with tuned states inside, whole and taken apart.
struct TunedModel {
  std::string whole;
  std::string base;
  std::string states;
};
TunedModel WriteTunedModel() {
  testing::RandomModelOptions options;
  options.layers = 4;
  options.vocab_size = 101;
  options.time_state = true;
  TunedModel model{absl::StrCat(::testing::TempDir(), "/whole.safetensors"),
                   absl::StrCat(::testing::TempDir(), "/base.safetensors"),
                   absl::StrCat(::testing::TempDir(), "/poet.pth")};
  EXPECT_OK(testing::WriteRandomModel(options, model.whole));
  options.time_state = false;
  EXPECT_OK(testing::WriteRandomModel(options, model.base));
  options.time_state = true;
  const absl::StatusOr<std::vector<testing::RawTensor>> tensors = testing::MakeRandomModel(options);
  EXPECT_OK(tensors);
  std::vector<testing::RawTensor> states;
  for (const testing::RawTensor& tensor : *tensors) {
    if (absl::EndsWith(tensor.spec.name, "time_state")) states.push_back(tensor);
  }
  EXPECT_OK(testing::WriteFileAtomically(model.states, testing::TorchZipBytes(states)));
  return model;
}

LocalCluster::Options ClusterOfStages(int stages) {
  LocalCluster::Options options;
  options.model = ModelPath();
  options.stages = stages;
  return options;
}

std::unique_ptr<RouterClient> ClientOf(const LocalCluster& cluster) {
  return MakeRouterClient(cluster.Channel("router-0"));
}

v1::GenerateRequest GreedyTurn(const Tokens& prompt, uint32_t max_tokens, const std::string& session = "",
                               const std::string& request_id = "") {
  v1::GenerateRequest request;
  request.mutable_tokens()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_tokens(max_tokens);
  request.set_session_id(session);
  request.set_request_id(request_id);
  return request;
}

// The tokens of a turn. `on_token` is called with the number of tokens so far. Fails if an index is not the next one.
absl::StatusOr<Tokens> Generate(
    RouterClient& client, const v1::GenerateRequest& request,
    const std::function<absl::Status(size_t)>& on_token = [](size_t) { return absl::OkStatus(); }) {
  Tokens tokens;
  RWKV_RETURN_IF_ERROR(client.Generate(request, [&](const v1::GenerateResponse& response) -> absl::Status {
    if (response.index() != tokens.size()) {
      return absl::DataLossError(absl::StrCat("index ", response.index(), " after ", tokens.size(), " tokens"));
    }
    if (!response.has_token_id()) return absl::OkStatus();
    tokens.push_back(response.token_id());
    return on_token(tokens.size());
  }));
  return tokens;
}

absl::StatusOr<Rows> Logits(RouterClient& client, const Tokens& tokens, const std::string& initial_state = "") {
  v1::LogitsRequest request;
  request.set_initial_state(initial_state);
  request.mutable_tokens()->mutable_ids()->Assign(tokens.begin(), tokens.end());
  Rows rows;
  RWKV_RETURN_IF_ERROR(client.Logits(request, [&](const v1::LogitsResponse& response) {
    rows += response.logits();
    return absl::OkStatus();
  }));
  return rows;
}

absl::StatusOr<std::vector<float>> DocumentLogprobs(RouterClient& client, const Tokens& tokens) {
  v1::ScoreDocumentRequest document;
  document.mutable_token_ids()->Assign(tokens.begin(), tokens.end());
  std::vector<float> logprobs;
  RWKV_RETURN_IF_ERROR(client.ScoreDocument(document, [&](const v1::ScoreDocumentResponse& response) {
    logprobs.insert(logprobs.end(), response.logprobs().begin(), response.logprobs().end());
    return absl::OkStatus();
  }));
  return logprobs;
}

absl::StatusOr<std::vector<float>> Embed(RouterClient& client, const Tokens& tokens, v1::EmbedSource source) {
  v1::EmbedRequest request;
  request.mutable_tokens()->mutable_ids()->Assign(tokens.begin(), tokens.end());
  request.set_source(source);
  RWKV_ASSIGN_OR_RETURN(const v1::EmbedResponse response, client.Embed(request));
  return std::vector<float>(response.values().begin(), response.values().end());
}

absl::Status CreateSession(RouterClient& client, const std::string& id, const std::string& initial_state = "") {
  v1::SessionsCreateRequest request;
  request.set_session_id(id);
  request.set_initial_state(initial_state);
  return client.CreateSession(request).status();
}

absl::StatusOr<Tokens> SessionLog(RouterClient& client, const std::string& id) {
  v1::SessionsGetRequest request;
  request.set_session_id(id);
  request.set_tokens_count(65536);
  RWKV_ASSIGN_OR_RETURN(const v1::SessionsGetResponse response, client.GetSession(request));
  return Tokens(response.token_ids().begin(), response.token_ids().end());
}

TEST(ClusterTest, OneTwoAndThreeStagesGiveTheSameBits) {
  Tokens first_tokens;
  Rows first_rows;
  for (const int stages : {1, 2, 3}) {
    SCOPED_TRACE(absl::StrCat(stages, " stages"));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(ClusterOfStages(stages)));
    const std::unique_ptr<RouterClient> client = ClientOf(*cluster);
    ASSERT_OK_AND_ASSIGN(const Tokens tokens, Generate(*client, GreedyTurn(kPrompt, 24)));
    ASSERT_OK_AND_ASSIGN(const Rows rows, Logits(*client, kPrompt));
    EXPECT_THAT(tokens, SizeIs(24));
    EXPECT_EQ(rows.size(), kPrompt.size() * 101 * sizeof(float));
    if (stages == 1) {
      first_tokens = tokens;
      first_rows = rows;
    }
    EXPECT_EQ(tokens, first_tokens);
    EXPECT_TRUE(rows == first_rows) << "the logits differ in some bit";
  }
}

// A document longer than a prompt may be, in several steps; and what embeddings are made of.
TEST(ClusterTest, DocumentsAndEmbeddingsAreTheSameBitsHoweverTheyAreCut) {
  Tokens document;
  for (uint32_t i = 0; i < 1000; ++i) document.push_back((i * i + 7 * i) % 101);
  const Tokens prefix(document.begin(), document.begin() + 60);
  std::vector<std::vector<float>> first;
  for (const int stages : {1, 3}) {
    SCOPED_TRACE(absl::StrCat(stages, " stages"));
    LocalCluster::Options options = ClusterOfStages(stages);
    options.router_flags = {"--max_prompt_tokens=100"};
    options.worker_flags = {absl::StrCat("--max_batch_tokens=", stages == 1 ? 128 : 13)};
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
    const std::unique_ptr<RouterClient> client = ClientOf(*cluster);
    std::vector<std::vector<float>> results(4);
    ASSERT_OK_AND_ASSIGN(results[0], DocumentLogprobs(*client, document));
    EXPECT_THAT(results[0], SizeIs(999));
    v1::ScoreRequest score;
    score.mutable_tokens()->mutable_ids()->Assign(prefix.begin(), prefix.end());
    ASSERT_OK_AND_ASSIGN(const v1::ScoreResponse scored, client->Score(score));
    EXPECT_EQ(std::vector<float>(results[0].begin(), results[0].begin() + 59),
              std::vector<float>(scored.logprobs().begin(), scored.logprobs().end()));
    ASSERT_OK_AND_ASSIGN(results[1], Embed(*client, prefix, v1::EMBED_SOURCE_HIDDEN_LAST));
    ASSERT_OK_AND_ASSIGN(results[2], Embed(*client, prefix, v1::EMBED_SOURCE_HIDDEN_MEAN));
    ASSERT_OK_AND_ASSIGN(results[3], Embed(*client, prefix, v1::EMBED_SOURCE_STATE));
    EXPECT_EQ(results[1].size(), results[2].size());
    EXPECT_NE(results[1], results[2]);
    if (stages == 1) first = results;
    EXPECT_EQ(results, first);
  }
}

TEST(ClusterTest, StatusNamesEveryProcessAndItsShare) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(ClusterOfStages(3)));
  ASSERT_OK_AND_ASSIGN(const v1::GetStatusResponse status, ClientOf(*cluster)->GetStatus());
  EXPECT_EQ(status.pipeline_state(), "serving");
  ASSERT_EQ(status.processes_size(), 5);
  int next_layer = 0;
  for (const v1::ProcessStatus& process : status.processes()) {
    EXPECT_EQ(process.address(), cluster->address(process.name())) << process.name();
    EXPECT_EQ(process.metrics_address(), cluster->metrics_address(process.name())) << process.name();
    EXPECT_EQ(process.pid(), cluster->pid(process.name())) << process.name();
    EXPECT_EQ(process.health(), "serving") << process.name();
    if (process.role() == "worker") {
      EXPECT_EQ(process.first_layer(), next_layer) << process.name();
      next_layer = process.end_layer();
    }
    EXPECT_THAT(common::CheckHealth(cluster->Channel(process.name()), absl::Now() + absl::Seconds(10)),
                IsOkAndHolds(true))
        << process.name();
  }
  EXPECT_EQ(next_layer, 4);
}

// Thirty-two clients at once, each with its own prompt; every answer must be that of a solo run.
TEST(ClusterTest, CompanyChangesNothing) {
  constexpr int kClients = 32;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(ClusterOfStages(2)));
  const std::unique_ptr<RouterClient> client = ClientOf(*cluster);
  std::vector<v1::GenerateRequest> requests;
  std::vector<Tokens> solo;
  for (int i = 0; i < kClients; ++i) {
    Tokens prompt(kPrompt.begin(), kPrompt.begin() + 1 + i % kPrompt.size());
    prompt.push_back(i);
    requests.push_back(GreedyTurn(prompt, 16));
    if (i % 2 == 1) {
      requests.back().mutable_sampling()->set_temperature(1.0f);
      requests.back().mutable_sampling()->set_seed(i);
    }
    ASSERT_OK_AND_ASSIGN(solo.emplace_back(), Generate(*client, requests.back()));
    ASSERT_THAT(solo.back(), SizeIs(16));
  }
  std::vector<absl::StatusOr<Tokens>> together(kClients, absl::UnknownError("did not run"));
  std::vector<std::thread> threads;
  for (int i = 0; i < kClients; ++i) {
    threads.emplace_back([&, i] { together[i] = Generate(*client, requests[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kClients; ++i)
    EXPECT_THAT(together[i], IsOkAndHolds(ElementsAreArray(solo[i]))) << "client " << i;
}

// Between turns, then in the middle of one, `disturb` happens to the cluster; a twin session is left alone. Both must
// hold the same tokens, and every client must have seen each of them once.
void ExpectUndisturbedTokens(LocalCluster& cluster, const std::string& name,
                             const std::function<absl::Status()>& disturb, const std::string& initial_state = "") {
  SCOPED_TRACE(name);
  const std::unique_ptr<RouterClient> client = ClientOf(cluster);
  const std::string twin = name + "-twin";
  ASSERT_OK(CreateSession(*client, name, initial_state));
  ASSERT_OK(CreateSession(*client, twin, initial_state));
  ASSERT_OK_AND_ASSIGN(const Tokens twin_first, Generate(*client, GreedyTurn(kPrompt, 20, twin, "turn-1")));
  ASSERT_OK_AND_ASSIGN(const Tokens twin_second, Generate(*client, GreedyTurn(kSecondPrompt, 400, twin, "turn-2")));

  ASSERT_OK_AND_ASSIGN(const Tokens first, Generate(*client, GreedyTurn(kPrompt, 20, name, "turn-1")));
  EXPECT_EQ(first, twin_first);
  ASSERT_OK(disturb());
  ASSERT_OK(cluster.WaitUntilServing());

  // The rest of the turn runs in this thread's callback, so the disturbance is certain to be in its middle.
  ASSERT_OK_AND_ASSIGN(const Tokens second,
                       Generate(*client, GreedyTurn(kSecondPrompt, 400, name, "turn-2"),
                                [&](size_t tokens) { return tokens == 5 ? disturb() : absl::OkStatus(); }));
  EXPECT_EQ(second, twin_second);
  ASSERT_OK_AND_ASSIGN(const Tokens log, SessionLog(*client, name));
  EXPECT_THAT(SessionLog(*client, twin), IsOkAndHolds(ElementsAreArray(log)));
}

TEST(ClusterTest, TokensAreThoseOfAnUndisturbedRunWhoeverIsKilled) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(ClusterOfStages(2)));
  for (const std::string& process : cluster->process_names()) {
    ExpectUndisturbedTokens(*cluster, "kill-" + process, [&]() -> absl::Status {
      RWKV_RETURN_IF_ERROR(cluster->Kill(process));
      return cluster->Restart(process);
    });
  }
  ExpectUndisturbedTokens(*cluster, "kill-all", [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(cluster->KillAll());
    return cluster->RestartAll();
  });
}

TEST(ClusterTest, SessionsGoOnAfterEveryProcessWasStopped) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(ClusterOfStages(2)));
  std::unique_ptr<RouterClient> client = ClientOf(*cluster);
  for (const char* session : {"stopped", "twin"}) {
    ASSERT_OK(CreateSession(*client, session));
    ASSERT_OK(Generate(*client, GreedyTurn(kPrompt, 20, session)));
  }
  ASSERT_OK_AND_ASSIGN(const Tokens expected, Generate(*client, GreedyTurn(kSecondPrompt, 20, "twin")));

  // Another cluster, of another number of stages on other ports, on the same folder.
  LocalCluster::Options options = ClusterOfStages(3);
  options.directory = cluster->directory();
  ASSERT_OK(cluster->Stop());
  cluster.reset();
  ASSERT_OK_AND_ASSIGN(cluster, LocalCluster::Start(options));
  client = ClientOf(*cluster);
  v1::GenerateRequest request = GreedyTurn(kSecondPrompt, 20, "stopped");
  uint64_t reused = 0;
  Tokens tokens;
  ASSERT_OK(client->Generate(request, [&](const v1::GenerateResponse& response) {
    if (response.has_token_id()) tokens.push_back(response.token_id());
    if (response.has_finish()) reused = response.finish().reused_tokens();
    return absl::OkStatus();
  }));
  EXPECT_EQ(tokens, expected);
  EXPECT_EQ(reused, kPrompt.size() + 19) << "the snapshot was not used";
}

TEST(ClusterTest, ATunedStateIsWhereASessionBeginsWhateverHappens) {
  const TunedModel model = WriteTunedModel();
  LocalCluster::Options options = ClusterOfStages(1);
  options.model = model.whole;
  Tokens expected;
  Rows expected_rows;
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
    const std::unique_ptr<RouterClient> client = ClientOf(*cluster);
    ASSERT_OK_AND_ASSIGN(expected, Generate(*client, GreedyTurn(kPrompt, 24)));
    ASSERT_OK_AND_ASSIGN(expected_rows, Logits(*client, kPrompt));
  }

  options = ClusterOfStages(2);
  options.model = model.base;
  options.worker_flags = {absl::StrCat("--initial_states=poet=", model.states)};
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  std::unique_ptr<RouterClient> client = ClientOf(*cluster);
  v1::GenerateRequest turn = GreedyTurn(kPrompt, 24);
  EXPECT_THAT(Generate(*client, turn), IsOkAndHolds(Not(ElementsAreArray(expected))));
  turn.set_initial_state("poet");
  EXPECT_THAT(Generate(*client, turn), IsOkAndHolds(ElementsAreArray(expected)));
  ASSERT_OK_AND_ASSIGN(const Rows rows, Logits(*client, kPrompt, "poet"));
  EXPECT_TRUE(rows == expected_rows) << "the logits differ in some bit from those of the states inside the model";
  for (const std::string& process : {"worker-1", "router-0"}) {
    ExpectUndisturbedTokens(
        *cluster, "kill-" + process,
        [&]() -> absl::Status {
          RWKV_RETURN_IF_ERROR(cluster->Kill(process));
          return cluster->Restart(process);
        },
        "poet");
  }

  // No snapshot is as old as these forks: they are rebuilt from the log. One shares no token.
  ASSERT_OK(CreateSession(*client, "s", "poet"));
  EXPECT_THAT(Generate(*client, GreedyTurn(kPrompt, 24, "s")), IsOkAndHolds(ElementsAreArray(expected)));
  for (const size_t position : {0, 5}) {
    v1::SessionsForkRequest fork;
    fork.set_session_id("s");
    fork.set_position(position);
    fork.set_new_session_id(absl::StrCat("fork-", position));
    ASSERT_OK(client->ForkSession(fork));
    const Tokens rest(kPrompt.begin() + position, kPrompt.end());
    EXPECT_THAT(Generate(*client, GreedyTurn(rest, 24, fork.new_session_id())),
                IsOkAndHolds(ElementsAreArray(expected)));
  }

  // Started without the state, the cluster does not pretend.
  ASSERT_OK(cluster->Stop());
  options.directory = cluster->directory();
  options.worker_flags.clear();
  cluster.reset();
  ASSERT_OK_AND_ASSIGN(cluster, LocalCluster::Start(options));
  client = ClientOf(*cluster);
  EXPECT_THAT(Generate(*client, GreedyTurn(kSecondPrompt, 5, "s")),
              testing::StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::HasSubstr("poet@")));
  EXPECT_THAT(CreateSession(*client, "another", "poet"),
              testing::StatusIs(absl::StatusCode::kNotFound, ::testing::HasSubstr("\"poet\"; those it has: none")));
}

TEST(ClusterTest, PortInUseIsSaidAndEndsTheProcess) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(ClusterOfStages(1)));
  LocalCluster::Options options = ClusterOfStages(1);
  options.state_store_flags = {absl::StrCat("--metrics_listen=", cluster->metrics_address("router-0"))};
  EXPECT_THAT(
      LocalCluster::StartWithoutWaiting(options).status(),
      testing::StatusIs(absl::StatusCode::kUnavailable, ::testing::HasSubstr(cluster->metrics_address("router-0"))));
}

}  // namespace
}  // namespace rwkv
