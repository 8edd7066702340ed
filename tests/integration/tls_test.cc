// A whole cluster with TLS, as real processes: the tokens of one without, certificates that change under it, and who is
// let in where.
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
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
#include "services/common/health.h"
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
using ::rwkv::testing::TestAuthority;
using ::rwkv::testing::TlsFolder;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

constexpr absl::Duration kRefusal = absl::Milliseconds(300);
constexpr absl::Duration kPatience = absl::Seconds(20);
constexpr char kKey[] = "a-key-that-nobody-should-find-in-a-log";
// printf %s "$kKey" | sha256sum
constexpr char kKeyHash[] = "66a18515db130f98230d01b86432fb496e532db51417f18e40807dca045610c9";

absl::StatusOr<std::vector<uint32_t>> Generate(RouterClient& client, const std::string& session,
                                               const std::string& request_id, int input, uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(request_id);
  for (int i = 0; i < input; ++i) request.mutable_tokens()->add_ids((i * i + 7 * i + 1) % 101);
  request.set_max_tokens(max_tokens);
  std::vector<uint32_t> tokens;
  const absl::Status status = client.Generate(request, [&](const v1::GenerateResponse& response) {
    if (response.has_token_id()) tokens.push_back(response.token_id());
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return tokens;
}

absl::Status CreateSession(RouterClient& client, const std::string& id) {
  v1::SessionsCreateRequest request;
  request.set_session_id(id);
  return client.CreateSession(request).status();
}

class TlsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = absl::StrCat(::testing::TempDir(), "/model.safetensors");
    ASSERT_OK(testing::WriteRandomModel({}, model_));
  }
  static LocalCluster::Options Options(bool tls) {
    LocalCluster::Options options;
    options.model = model_;
    options.tls = tls;
    options.router_flags = {"--snapshot_interval_tokens=16"};
    return options;
  }
  static std::string model_;
};

std::string TlsTest::model_;

TEST_F(TlsTest, GivesTheTokensOfAClusterWithoutOverKillsAndNewCertificates) {
  std::vector<uint32_t> first, second;
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Options(false)));
    const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
    ASSERT_OK(CreateSession(*client, "s"));
    ASSERT_OK_AND_ASSIGN(first, Generate(*client, "s", "a", 20, 40));
    ASSERT_OK_AND_ASSIGN(second, Generate(*client, "s", "b", 5, 300));
  }
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Options(true)));
  const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  ASSERT_OK(CreateSession(*client, "s"));
  EXPECT_THAT(Generate(*client, "s", "a", 20, 40), testing::IsOkAndHolds(first));
  // Everybody gets a certificate of another authority, while both are believed; then all are started anew, one after
  // the other, some with the old connections and some with the new files.
  TestAuthority next("next");
  const std::string both = cluster->authority().certificate() + next.certificate();
  for (const std::string& name : cluster->process_names()) cluster->files(name).WriteAuthorities(both);
  cluster->files("operator").WriteAuthorities(both);
  absl::StatusOr<std::vector<uint32_t>> got = absl::UnknownError("not asked");
  std::thread turn([&] {
    const std::unique_ptr<RouterClient> caller = MakeRouterClient(cluster->Channel("router-0"));
    got = Generate(*caller, "s", "b", 5, 300);
  });
  for (const std::string& name : {"state_store-0", "worker-1", "router-0", "worker-0"}) {
    const std::string role = name == "state_store-0" ? "store" : name.substr(0, name.rfind('-'));
    cluster->files(name).Write(next.IssueRole(role));
    EXPECT_OK(cluster->Kill(name));
    EXPECT_OK(cluster->Restart(name));
  }
  turn.join();
  EXPECT_THAT(got, testing::IsOkAndHolds(second));
}

TEST_F(TlsTest, EveryPortRefusesWhoIsNobody) {
  LocalCluster::Options options = Options(true);
  const std::string keys = absl::StrCat(::testing::TempDir(), "/api_keys");
  ReplaceFile(keys, absl::StrCat("sha256:", kKeyHash, " name=alice\n"));
  options.router_flags.push_back("--api_keys=" + keys);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  const auto dial = [&](const std::string& name, const common::ClientSecurityOptions& security) {
    common::ChannelOptions channel;
    if (!security.authorities.empty()) {
      const absl::StatusOr<common::ClientCredentials> made = common::MakeClientCredentials(security);
      EXPECT_THAT(made, IsOk());
      if (made.ok()) channel.credentials = made->credentials;
    }
    return common::MakeChannel(cluster->address(name), channel);
  };
  const auto health = [&](const std::string& name, const common::ClientSecurityOptions& security,
                          absl::Duration patience = kRefusal) {
    return common::CheckHealth(dial(name, security), absl::Now() + patience).status();
  };
  common::ClientSecurityOptions nobody, stranger, client, key;
  nobody.authorities = stranger.authorities = client.authorities = key.authorities =
      cluster->files("operator").authorities();
  TestAuthority other("other");
  TlsFolder strange(::testing::TempDir() + "/strange"), ours(::testing::TempDir() + "/client");
  strange.Write(other.IssueRole("router"));
  ours.Write(cluster->authority().IssueRole("client"));
  stranger.certificate = strange.certificate();
  stranger.key = strange.key();
  client.certificate = ours.certificate();
  client.key = ours.key();
  key.api_key_file = ::testing::TempDir() + "/key";
  ReplaceFile(key.api_key_file, kKey);
  for (const std::string& name : cluster->process_names()) {
    EXPECT_THAT(health(name, {}), Not(IsOk())) << name << " in plaintext";
    EXPECT_THAT(health(name, nobody), Not(IsOk())) << name << " without a certificate";
    EXPECT_THAT(health(name, stranger), Not(IsOk())) << name << " with another authority's";
    EXPECT_THAT(health(name, client, kPatience), IsOk()) << name;
  }
  // Keys are the router's clients'. Elsewhere nobody asks for one.
  EXPECT_THAT(health("router-0", key, kPatience), IsOk());
  EXPECT_THAT(health("worker-0", key), Not(IsOk()));
  const std::unique_ptr<RouterClient> alice = MakeRouterClient(dial("router-0", key));
  EXPECT_THAT(Generate(*alice, "", "", 5, 4), testing::IsOkAndHolds(SizeIs(4)));
  EXPECT_THAT(alice->GetStatus(), StatusIs(absl::StatusCode::kPermissionDenied));
  // What is a router's and a worker's is not a client's, and not each other's.
  const std::unique_ptr<RouterClient> lost = MakeRouterClient(dial("worker-0", client));
  EXPECT_THAT(lost->ListModels(), StatusIs(absl::StatusCode::kUnimplemented));
  for (const std::string& name : cluster->process_names()) {
    EXPECT_THAT(cluster->Log(name), Not(HasSubstr(kKey))) << name;
    EXPECT_THAT(cluster->Log(name), Not(HasSubstr("PRIVATE"))) << name;
    EXPECT_THAT(cluster->Log(name), Not(HasSubstr(kKeyHash))) << name;
  }
}

TEST_F(TlsTest, FilesThatAreOfNoUseStopNoProcessThatRuns) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Options(true)));
  TestAuthority& ours = cluster->authority();
  // The key of another, half of a file, and another's certificate.
  const TestAuthority::Pair router = ours.IssueRole("router"), store = ours.IssueRole("store");
  cluster->files("router-0").Write({router.certificate, ours.IssueRole("router").key});
  cluster->files("state_store-0").Write({store.certificate.substr(0, 300), store.key});
  cluster->files("worker-0").Write(router);
  for (const std::string& name : {"router-0", "state_store-0", "worker-0"}) {
    EXPECT_TRUE(
        testing::WaitUntil([&] { return absl::StrContains(cluster->Log(name), "tls_files_unusable"); }, kPatience))
        << name;
  }
  // All of them open new connections and take them.
  ASSERT_OK(cluster->Kill("worker-1"));
  ASSERT_OK(cluster->Restart("worker-1"));
  ASSERT_OK(cluster->WaitUntilServing());
  const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  ASSERT_OK(CreateSession(*client, "s"));
  EXPECT_THAT(Generate(*client, "s", "a", 20, 8), testing::IsOkAndHolds(SizeIs(8)));
  // A start with them ends, and says why.
  ASSERT_OK(cluster->Terminate("router-0"));
  ASSERT_THAT(cluster->Restart("router-0"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is not the key of")));
  cluster->files("router-0").Write(router);
  ASSERT_OK(cluster->Restart("router-0"));
  EXPECT_OK(cluster->WaitUntilServing());
}

TEST_F(TlsTest, AWorkerOfAnotherRoleIsNoWorker) {
  LocalCluster::Options options = Options(true);
  options.start_timeout = absl::Seconds(30);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  ASSERT_OK(cluster->Terminate("worker-1"));
  cluster->files("worker-1").Write(cluster->authority().IssueRole("client"));
  ASSERT_THAT(cluster->Restart("worker-1"),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is of the role client, this process is a worker")));
  cluster->files("worker-1").Write(cluster->authority().IssueRole("worker"));
  ASSERT_OK(cluster->Restart("worker-1"));
  EXPECT_OK(cluster->WaitUntilServing());
}

}  // namespace
}  // namespace rwkv
