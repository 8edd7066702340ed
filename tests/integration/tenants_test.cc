// Tenants of a real cluster: what is accounted is what clients were told, whatever process died meanwhile, and the
// tenants file changes under calls that do not notice.
#include <atomic>
#include <cstdint>
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
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/common/security/security.h"
#include "services/router/client/router_client.h"
#include "tests/testing/certificates.h"
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
using ::rwkv::testing::ReplaceFile;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr char kKey[] = "a-key-that-nobody-should-find-in-a-log";
// printf %s "$kKey" | sha256sum
constexpr char kKeyHash[] = "66a18515db130f98230d01b86432fb496e532db51417f18e40807dca045610c9";

struct Sums {
  uint64_t turns = 0;
  uint64_t prompt_tokens = 0;
  uint64_t generated_tokens = 0;
};

class TenantsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = absl::StrCat(::testing::TempDir(), "/model.safetensors");
    ASSERT_OK(testing::WriteRandomModel({}, model_));
  }

  void Start(const std::string& tenants, int routers = 1) {
    ReplaceFile(tenants_, tenants);
    ReplaceFile(key_, kKey);
    ReplaceFile(keys_, absl::StrCat("sha256:", kKeyHash, " name=alice tenant=acme\n"));
    LocalCluster::Options options;
    options.model = model_;
    options.tls = true;
    options.routers = options.pipelines = routers;
    options.router_flags = {"--snapshot_interval_tokens=16", "--api_keys=" + keys_, "--tenants=" + tenants_};
    absl::StatusOr<std::unique_ptr<LocalCluster>> cluster = LocalCluster::Start(options);
    ASSERT_THAT(cluster, IsOk());
    cluster_ = *std::move(cluster);
  }

  // With the API key of tenant acme.
  std::unique_ptr<RouterClient> Acme(const std::string& router = "router-0") {
    common::ClientSecurityOptions security;
    security.authorities = cluster_->files("operator").authorities();
    security.api_key_file = key_;
    const absl::StatusOr<common::ClientCredentials> made = common::MakeClientCredentials(security);
    EXPECT_THAT(made, IsOk());
    common::ChannelOptions channel;
    channel.credentials = made->credentials;
    return MakeRouterClient(common::MakeChannel(cluster_->address(router), channel));
  }

  // Adds what the call's last message says.
  static absl::Status Generate(RouterClient& client, const std::string& session, const std::string& request_id,
                               uint32_t max_tokens, Sums* sums, std::atomic<int>* tokens = nullptr) {
    v1::GenerateRequest request;
    request.set_session_id(session);
    request.set_request_id(request_id);
    for (int i = 0; i < 9; ++i) request.mutable_tokens()->add_ids((i * i + 7 * i + 1) % 101);
    request.set_max_tokens(max_tokens);
    request.set_ignore_end_of_text(true);
    return client.Generate(request, [&](const v1::GenerateResponse& response) {
      if (response.has_finish()) {
        ++sums->turns;
        sums->prompt_tokens += response.finish().prompt_tokens();
        sums->generated_tokens += response.finish().generated_tokens();
        EXPECT_EQ(response.finish().session_id(), session);
      } else if (tokens != nullptr) {
        ++*tokens;
      }
      return absl::OkStatus();
    });
  }

  void ExpectUsage(const Sums& sums) {
    v1::GetTenantUsageRequest request;
    request.set_tenant("acme");
    ASSERT_OK_AND_ASSIGN(const v1::GetTenantUsageResponse usage,
                         MakeRouterClient(cluster_->Channel("router-0"))->GetTenantUsage(request));
    EXPECT_EQ(usage.turns(), sums.turns);
    EXPECT_EQ(usage.prompt_tokens(), sums.prompt_tokens);
    EXPECT_EQ(usage.generated_tokens(), sums.generated_tokens);
  }

  static std::string model_;
  const std::string tenants_ = ::testing::TempDir() + "/tenants", keys_ = ::testing::TempDir() + "/api_keys";
  const std::string key_ = ::testing::TempDir() + "/key";
  std::unique_ptr<LocalCluster> cluster_;
};

std::string TenantsTest::model_;

TEST_F(TenantsTest, WhatIsAccountedIsWhatClientsWereToldWhateverDied) {
  Start("name=acme\n");
  const std::unique_ptr<RouterClient> client = Acme();
  v1::SessionsCreateRequest create;
  create.set_session_id("s");
  ASSERT_OK(client->CreateSession(create));
  Sums sums;
  ASSERT_OK(Generate(*client, "s", "first", 20, &sums));
  ASSERT_OK(Generate(*client, "", "", 7, &sums));
  ExpectUsage(sums);
  // Each process is killed in the middle of a turn, which goes on.
  int turn = 0;
  for (const std::string& name : {"router-0", "worker-1", "state_store-0", "router-0"}) {
    absl::Status status = absl::UnknownError("not asked");
    std::atomic<int> tokens{0};
    std::thread caller([&] { status = Generate(*client, "s", absl::StrCat("turn-", turn), 150, &sums, &tokens); });
    EXPECT_TRUE(testing::WaitUntil([&] { return tokens > 5 * turn; }));
    EXPECT_OK(cluster_->Kill(name));
    EXPECT_OK(cluster_->Restart(name));
    caller.join();
    ASSERT_THAT(status, IsOk()) << name;
    ASSERT_OK(cluster_->WaitUntilServing());
    // Without a session: what was told before the next death is on disk.
    ASSERT_OK(Generate(*client, "", "", 3 + turn, &sums));
    ++turn;
  }
  ASSERT_OK(cluster_->KillAll());
  ASSERT_OK(cluster_->RestartAll());
  ASSERT_OK(cluster_->WaitUntilServing());
  ExpectUsage(sums);
  // A session that is no more was used all the same.
  v1::SessionsDeleteRequest erase;
  erase.set_session_id("s");
  ASSERT_OK(client->DeleteSession(erase));
  ExpectUsage(sums);
}

TEST_F(TenantsTest, TheFileChangesUnderCallsThatDoNotNotice) {
  Start("name=acme\n");
  std::atomic<bool> stop{false};
  std::atomic<int> done{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) {
    callers.emplace_back([&] {
      const std::unique_ptr<RouterClient> client = Acme();
      Sums sums;
      while (!stop) {
        EXPECT_THAT(Generate(*client, "", "", 5, &sums), IsOk());
        ++done;
      }
    });
  }
  const auto await = [](const auto& what) { EXPECT_TRUE(testing::WaitUntil(what)); };
  const auto log_has = [this](const std::string& words) { return absl::StrContains(cluster_->Log("router-0"), words); };
  for (int i = 0; i < 20; ++i) {
    const int before = done;
    ReplaceFile(tenants_, absl::StrCat("name=acme weight=", 1 + i, "\n"));
    await([&] { return done >= before + 2; });
  }
  await([&] { return log_has("tenants_read"); });
  ReplaceFile(tenants_, "name=acme weight=none\n");
  await([&] { return log_has("tenants_unusable") && log_has("tenant acme: weight is"); });
  stop = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_GE(done, 40);
  // And it does take effect.
  ReplaceFile(tenants_, "name=other\n");
  const std::unique_ptr<RouterClient> client = Acme();
  Sums sums;
  absl::Status status;
  for (const absl::Time limit = absl::Now() + absl::Seconds(30); absl::Now() < limit;) {
    status = Generate(*client, "", "", 1, &sums);
    if (!status.ok()) break;
  }
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("acme")));
}

// Calls of one token until one ends as `is_it` wants it.
absl::Status CallUntil(RouterClient& client, const std::function<bool(const absl::Status&)>& is_it) {
  v1::GenerateRequest request;
  request.mutable_tokens()->add_ids(1);
  request.set_max_tokens(1);
  absl::Status status;
  for (const absl::Time limit = absl::Now() + absl::Seconds(60); absl::Now() < limit;) {
    status = client.Generate(request, [](const v1::GenerateResponse&) { return absl::OkStatus(); });
    if (is_it(status)) return absl::OkStatus();
  }
  return absl::DeadlineExceededError(absl::StrCat("not within a minute; the last one: ", status.ToString()));
}

TEST_F(TenantsTest, WhatIsUsedAtOneRouterIsUsedAtAll) {
  Start("name=acme tokens_per_minute=600\n", 2);
  Sums sums;
  ASSERT_OK(Generate(*Acme("router-0"), "", "", 1500, &sums));
  // A minute and a half of debt, which is not its own: one that only its own calls had emptied would say a second.
  EXPECT_OK(CallUntil(*Acme("router-1"), [](const absl::Status& status) {
    return absl::StrContains(status.message(), "tokens_per_minute, 600") &&
           common::GetRetryDelay(status).value_or(absl::ZeroDuration()) > absl::Seconds(20);
  }));
}

TEST_F(TenantsTest, CallsThatRunAtOneRouterRunForAll) {
  Start("name=acme concurrent_turns=1\n", 2);
  std::atomic<bool> stop{false};
  absl::Status ended;
  std::thread running([&] {
    v1::GenerateRequest request;
    request.mutable_tokens()->add_ids(1);
    request.set_max_tokens(1 << 19);
    request.set_ignore_end_of_text(true);
    ended = Acme("router-0")->Generate(request, [&](const v1::GenerateResponse&) {
      return stop ? absl::CancelledError("enough") : absl::OkStatus();
    });
  });
  const std::unique_ptr<RouterClient> other = Acme("router-1");
  EXPECT_OK(CallUntil(
      *other, [](const absl::Status& status) { return absl::StrContains(status.message(), "concurrent_turns, 1"); }));
  stop = true;
  running.join();
  EXPECT_THAT(ended, StatusIs(absl::StatusCode::kCancelled));
  EXPECT_OK(CallUntil(*other, [](const absl::Status& status) { return status.ok(); }));
}

}  // namespace
}  // namespace rwkv
