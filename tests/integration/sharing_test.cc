// Long answers share slots, and turns go on without input, as real processes: tokens of undisturbed runs.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/router_client.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::testing::SizeIs;

constexpr absl::Duration kLimit = absl::Seconds(60);

std::string ModelPath() {
  static const std::string* const path = [] {
    testing::RandomModelOptions options;
    options.layers = 4;
    auto* path = new std::string(absl::StrCat(::testing::TempDir(), "/sharing.safetensors"));
    const absl::Status status = testing::WriteRandomModel(options, *path);
    if (!status.ok()) ADD_FAILURE() << status;
    return path;
  }();
  return *path;
}

LocalCluster::Options Cluster(int stages) {
  LocalCluster::Options options;
  options.model = ModelPath();
  options.stages = stages;
  return options;
}

// A turn with everything that its tokens may depend on. Without a session if `session` is empty; no `input`: it goes
// on.
v1::GenerateRequest Turn(const std::string& session, const std::string& request_id, int input, uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(session.empty() ? "" : request_id);
  for (int i = 0; i < input; ++i) request.mutable_tokens()->add_ids((i * i + 7 * i + 1) % 101);
  request.set_max_tokens(max_tokens);
  request.mutable_sampling()->set_temperature(0.8f);
  request.mutable_sampling()->set_seed(11);
  request.mutable_sampling()->set_frequency_penalty(0.4f);
  request.mutable_sampling()->set_presence_penalty(0.3f);
  return request;
}

struct Answer {
  absl::Status status;
  std::vector<uint32_t> tokens;
  v1::Finish finish;
};

Answer Generate(RouterClient& client, const v1::GenerateRequest& request, std::atomic<int>* count = nullptr) {
  Answer answer;
  answer.status = client.Generate(request, [&](const v1::GenerateResponse& response) {
    if (response.has_token_id()) answer.tokens.push_back(response.token_id());
    if (response.has_finish()) answer.finish = response.finish();
    if (count != nullptr) *count = static_cast<int>(answer.tokens.size());
    return absl::OkStatus();
  });
  return answer;
}

void CreateSession(RouterClient& client, const std::string& id) {
  v1::SessionsCreateRequest request;
  request.set_session_id(id);
  ASSERT_THAT(client.CreateSession(request), IsOk());
}

TEST(SharingTest, LongAnswersTakeTurnsInOneSlotAlsoOverAKill) {
  constexpr uint32_t kTokens = 600;
  std::vector<uint32_t> alone;
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Cluster(1)));
    alone = Generate(*MakeRouterClient(cluster->Channel("router-0")), Turn("", "", 12, kTokens)).tokens;
    ASSERT_THAT(alone, SizeIs(kTokens));
  }
  LocalCluster::Options options = Cluster(3);
  options.worker_flags = {"--slots=1"};
  options.router_flags = {"--slot_quantum=20ms", "--snapshot_interval_tokens=64"};
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  std::vector<Answer> answers(4);
  std::vector<std::atomic<int>> counts(answers.size());
  std::vector<std::thread> clients;
  for (size_t i = 0; i < answers.size(); ++i) {
    const std::string session = i % 2 == 0 ? "" : absl::StrCat("s", i);
    if (!session.empty()) CreateSession(*client, session);
    clients.emplace_back(
        [&, i, session] { answers[i] = Generate(*client, Turn(session, "r", 12, kTokens), &counts[i]); });
  }
  // Everybody has begun before anybody is through.
  EXPECT_TRUE(testing::WaitUntil(
      [&] { return std::all_of(counts.begin(), counts.end(), [](const auto& count) { return count > 0; }); }, kLimit));
  for (const std::atomic<int>& count : counts) EXPECT_LT(count, static_cast<int>(kTokens));
  EXPECT_OK(cluster->Kill("worker-1"));
  EXPECT_OK(cluster->Restart("worker-1"));
  for (std::thread& one : clients) one.join();
  for (size_t i = 0; i < answers.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_THAT(answers[i].status, IsOk());
    EXPECT_EQ(answers[i].tokens, alone);
  }
}

TEST(SharingTest, GoingOnGivesTheTokensOfOneTurnOverCutsAndStops) {
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Cluster(2)));
  std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  const Answer whole = Generate(*client, Turn("", "", 12, 60));
  ASSERT_THAT(whole.tokens, SizeIs(60));
  CreateSession(*client, "s");
  std::vector<uint32_t> tokens = Generate(*client, Turn("s", "t0", 12, 15)).tokens;
  ASSERT_THAT(tokens, SizeIs(15));
  for (int turn = 1; turn < 4; ++turn) {
    SCOPED_TRACE(turn);
    if (turn == 2) {  // Other processes, other stages.
      LocalCluster::Options options = Cluster(3);
      options.directory = cluster->directory();
      ASSERT_OK(cluster->Stop());
      client.reset();
      cluster.reset();
      ASSERT_OK_AND_ASSIGN(cluster, LocalCluster::Start(options));
      client = MakeRouterClient(cluster->Channel("router-0"));
    }
    const Answer more = Generate(*client, Turn("s", absl::StrCat("t", turn), 0, 15));
    ASSERT_THAT(more.status, IsOk());
    EXPECT_EQ(more.finish.reused_tokens(), 12 + tokens.size() - 1) << "more than the last token was fed";
    tokens.insert(tokens.end(), more.tokens.begin(), more.tokens.end());
  }
  EXPECT_EQ(tokens, whole.tokens);
  // And anew: the same seed gives the same answer.
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("s");
  rewind.set_position(12);
  ASSERT_THAT(client->RewindSession(rewind), IsOk());
  EXPECT_EQ(Generate(*client, Turn("s", "again", 0, 60)).tokens, whole.tokens);
}

}  // namespace
}  // namespace rwkv
