// Two pipelines, a spare, two routers: whoever is killed or stopped under streaming sessions, each stream is that of an
// undisturbed run.
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/health.h"
#include "services/router/client/router_client.h"
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

using Tokens = std::vector<uint32_t>;

constexpr absl::Duration kLimit = absl::Seconds(60);
constexpr int kTokensPerTurn = 300;

LocalCluster::Options TwoOfEach() {
  testing::RandomModelOptions model;
  model.layers = 4;
  model.vocab_size = 101;
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/failover.safetensors");
  EXPECT_OK(testing::WriteRandomModel(model, options.model));
  options.stages = 2;
  options.pipelines = 2;
  options.spares = {1};
  options.routers = 2;
  options.worker_flags = {"--slots=8", "--threads=1"};
  options.router_flags = {"--lease_ttl=3s", "--snapshot_interval_tokens=64"};
  return options;
}

std::unique_ptr<RouterClient> ClientOf(const LocalCluster& cluster, int first = 0) {
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int i = 0; i < 2; ++i) channels.push_back(cluster.Channel(absl::StrCat("router-", (first + i) % 2)));
  router::RouterClientOptions options;
  options.max_resumes = 200;
  options.last_pause = absl::Milliseconds(200);
  return MakeRouterClient(channels, options);
}

bool WaitUntil(const std::function<bool()>& condition) {
  for (const absl::Time limit = absl::Now() + kLimit; absl::Now() < limit; absl::SleepFor(absl::Milliseconds(5))) {
    if (condition()) return true;
  }
  return false;
}

// One turn of a session, however often it takes to be let in.
absl::StatusOr<Tokens> Turn(RouterClient& client, const std::string& session, int number) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(absl::StrCat("turn-", number));
  for (uint32_t i = 0; i < 5; ++i) request.mutable_tokens()->add_ids((7 * number + 3 * i + 1) % 101);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(17);
  request.set_max_tokens(kTokensPerTurn);
  Tokens tokens;
  absl::Status status;
  const absl::Time limit = absl::Now() + kLimit;
  do {
    status = client.Generate(request, [&tokens](const v1::GenerateResponse& response) {
      if (response.has_finish()) return absl::OkStatus();
      if (response.index() != tokens.size()) return absl::InternalError("an index came twice, or is missing");
      tokens.push_back(response.token_id());
      return absl::OkStatus();
    });
    request.set_resume_from(tokens.size());
    // Between two turns, too, the session may be with a router that was lost; and one that is there may be without a
    // pipeline for a moment, or full.
    if (!absl::IsAborted(status) && !absl::IsUnavailable(status) && !absl::IsResourceExhausted(status)) break;
    absl::SleepFor(absl::Milliseconds(20));
  } while (absl::Now() < limit);
  if (!status.ok()) return status;
  return tokens;
}

// A conversation that goes on until it is told to stop.
struct Conversation {
  std::string session;
  std::vector<Tokens> turns;
  absl::Status status;
  std::atomic<int> done{0};
  std::thread thread;
};

class FailoverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto cluster = LocalCluster::Start(TwoOfEach());
    ASSERT_THAT(cluster, IsOk());
    cluster_ = *std::move(cluster);
    const std::unique_ptr<RouterClient> client = ClientOf(*cluster_);
    for (int i = 0; i < 6; ++i) {
      auto& conversation = *conversations_.emplace_back(std::make_unique<Conversation>());
      conversation.session = absl::StrCat("s", i);
      CreateSession(*client, conversation.session);
      conversation.thread = std::thread([this, i, &conversation] {
        const std::unique_ptr<RouterClient> client = ClientOf(*cluster_, i);
        while (!stop_) {
          const absl::StatusOr<Tokens> tokens = Turn(*client, conversation.session, conversation.done);
          conversation.status = tokens.status();
          if (!tokens.ok()) return;
          conversation.turns.push_back(*tokens);
          ++conversation.done;
        }
      });
    }
    Streams();
  }

  void TearDown() override {
    stop_ = true;
    for (const auto& conversation : conversations_) {
      conversation->thread.join();
      EXPECT_THAT(conversation->status, IsOk()) << conversation->session << ", turn " << conversation->done;
    }
  }

  static void CreateSession(RouterClient& client, const std::string& id) {
    v1::SessionsCreateRequest create;
    create.set_session_id(id);
    ASSERT_THAT(client.CreateSession(create).status(), IsOk());
  }

  // Each conversation gets further.
  void Streams() {
    std::vector<int> before;
    for (const auto& conversation : conversations_) before.push_back(conversation->done);
    ASSERT_TRUE(WaitUntil([&] {
      size_t further = 0;
      for (size_t i = 0; i < before.size(); ++i) further += conversations_[i]->done > before[i];
      return further == before.size();
    })) << "the streams stand still";
  }

  // Ends the conversations and says each again, undisturbed.
  void Compare() {
    stop_ = true;
    for (const auto& conversation : conversations_) {
      if (conversation->thread.joinable()) conversation->thread.join();
    }
    ASSERT_THAT(cluster_->RestartAll(), IsOk());
    ASSERT_THAT(cluster_->WaitUntilServing(), IsOk());
    const std::unique_ptr<RouterClient> client = ClientOf(*cluster_);
    for (auto& conversation : conversations_) {
      ASSERT_THAT(conversation->status, IsOk()) << conversation->session;
      const std::string again = absl::StrCat(conversation->session, "-again");
      CreateSession(*client, again);
      for (size_t turn = 0; turn < conversation->turns.size(); ++turn) {
        const absl::StatusOr<Tokens> tokens = Turn(*client, again, static_cast<int>(turn));
        ASSERT_THAT(tokens, IsOk());
        EXPECT_EQ(conversation->turns[turn], *tokens) << conversation->session << ", turn " << turn;
        EXPECT_EQ(tokens->size(), kTokensPerTurn);
      }
    }
    for (auto& conversation : conversations_) conversation->thread = std::thread([] {});  // For TearDown().
  }

  void KillAndRestart(const std::string& name) {
    ASSERT_THAT(cluster_->Kill(name), IsOk());
    Streams();  // Nobody waits for it.
    ASSERT_THAT(cluster_->Restart(name), IsOk());
    Streams();
  }

  void FreezeAndThaw(const std::string& name) {
    ASSERT_THAT(cluster_->Freeze(name), IsOk());
    Streams();
    ASSERT_THAT(cluster_->Thaw(name), IsOk());
    Streams();
  }

  std::unique_ptr<LocalCluster> cluster_;
  std::atomic<bool> stop_{false};
  std::vector<std::unique_ptr<Conversation>> conversations_;
};

TEST_F(FailoverTest, AnyWorkerIsKilledOrStopped) {
  for (const char* worker : {"worker-0", "worker-3"}) KillAndRestart(worker);
  FreezeAndThaw("worker-1");
  FreezeAndThaw("worker-2");
  KillAndRestart("worker-4");
  Compare();
}

TEST_F(FailoverTest, AnyRouterIsKilledOrStopped) {
  KillAndRestart("router-0");
  KillAndRestart("router-1");
  FreezeAndThaw("router-0");
  Compare();
}

TEST_F(FailoverTest, ARouterAndAWorkerAtOnceAndAllOfAPipeline) {
  ASSERT_THAT(cluster_->Kill("router-1"), IsOk());
  KillAndRestart("worker-2");
  ASSERT_THAT(cluster_->Restart("router-1"), IsOk());
  Streams();
  ASSERT_THAT(cluster_->Kill("worker-0"), IsOk());
  KillAndRestart("worker-1");
  ASSERT_THAT(cluster_->Restart("worker-0"), IsOk());
  Streams();
  Compare();
}

TEST(StandbyTest, ARouterMoreThanPipelinesStandsByAndTakesOver) {
  LocalCluster::Options options = TwoOfEach();
  options.pipelines = 1;
  options.spares = {};
  auto cluster = LocalCluster::Start(options);
  ASSERT_THAT(cluster, IsOk());
  const auto serving = [&](int router, const std::string& name = "") {
    return common::CheckHealth((*cluster)->Channel(absl::StrCat("router-", router)), absl::Now() + absl::Seconds(5),
                               name);
  };
  int driver = -1;
  ASSERT_TRUE(WaitUntil([&] {
    for (int i = 0; i < 2; ++i) {
      const absl::StatusOr<bool> is_serving = serving(i);
      if (is_serving.ok() && *is_serving) driver = i;
    }
    return driver >= 0;
  }));
  const int standby = 1 - driver;
  EXPECT_THAT(serving(standby), IsOkAndHolds(false));
  EXPECT_THAT(serving(standby, "live"), IsOkAndHolds(true));
  ASSERT_THAT((*cluster)->Kill(absl::StrCat("router-", driver)), IsOk());
  const absl::Time begin = absl::Now();
  ASSERT_TRUE(WaitUntil([&] {
    const absl::StatusOr<bool> is_serving = serving(standby);
    return is_serving.ok() && *is_serving;
  }));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5)) << "two seconds, and a slow machine";
  // It falls when there is nothing left to serve with, and the process is still alive.
  ASSERT_THAT((*cluster)->Kill("worker-1"), IsOk());
  ASSERT_TRUE(WaitUntil([&] {
    const absl::StatusOr<bool> is_serving = serving(standby);
    return is_serving.ok() && !*is_serving;
  }));
  EXPECT_THAT(serving(standby, "live"), IsOkAndHolds(true));
}

}  // namespace
}  // namespace rwkv
