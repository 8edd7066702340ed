// Chaos: streaming sessions of two tenants on two of everything, over a PostgreSQL and an S3, while anything is killed,
// stopped and restarted by a schedule drawn from a seed. Every stream must be that of an undisturbed run.
//
// Environment: CHAOS_SEED (default: any; printed), CHAOS_SECONDS (75), CHAOS_CLIENTS (12). tests/chaos/run.sh sets it.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "services/common/channel.h"
#include "services/common/security/security.h"
#include "services/router/client/router_client.h"
#include "tests/testing/certificates.h"
#include "tests/testing/conversations.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/shared_cluster.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_servers.h"

namespace rwkv {
namespace {

using ::rwkv::testing::Conversations;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::SharedServers;

constexpr size_t kMostFaultsAtOnce = 2;
constexpr double kMeanSecondsBetweenFaults = 1.5;
// Conversations are of the last two in turn. What they are held to is told by the first: it has read nothing before, so
// no state that chaos has made is among what it begins with. The hashes: printf %s "$key" | sha256sum
struct Tenant {
  const char* name;
  const char* key;
  const char* hash;
};
constexpr Tenant kTenants[] = {
    {"hooli", "the-key-of-hooli-in-chaos", "d9fc202c46ff3b907882329adb4167a1dd42b8c6e568cb20101b37a210b53117"},
    {"acme", "the-key-of-acme-in-chaos", "b832386559f771106463a32a1aad71fc574e480f475d960b86875d7803fac574"},
    {"initech", "the-key-of-initech-in-chaos", "41341215d7d63ac19c07f12b37be3f11899a5aeff768e870f4d6412e209eb785"},
};

std::string KeyFile(const Tenant& tenant) { return absl::StrCat(::testing::TempDir(), "/", tenant.name, ".key"); }

// TLS, and a key for each tenant, the last of which has twice the share of the others.
void AddTenants(LocalCluster::Options* options) {
  std::string keys, tenants;
  for (const Tenant& tenant : kTenants) {
    testing::ReplaceFile(KeyFile(tenant), tenant.key);
    absl::StrAppend(&keys, "sha256:", tenant.hash, " name=", tenant.name, " tenant=", tenant.name, "\n");
    absl::StrAppend(&tenants, "name=", tenant.name, " weight=", &tenant == &kTenants[2] ? 2 : 1, "\n");
  }
  const std::string folder = ::testing::TempDir();
  testing::ReplaceFile(folder + "/api_keys", keys);
  testing::ReplaceFile(folder + "/tenants", tenants);
  options->tls = true;
  options->router_flags.push_back(absl::StrCat("--api_keys=", folder, "/api_keys"));
  options->router_flags.push_back(absl::StrCat("--tenants=", folder, "/tenants"));
}

// Of all routers, beginning with another one for each number.
std::unique_ptr<router::RouterClient> TenantsClient(const LocalCluster& cluster, int number) {
  common::ClientSecurityOptions security;
  security.authorities = cluster.files("operator").authorities();
  security.api_key_file = KeyFile(number == Conversations::kTeller ? kTenants[0] : kTenants[1 + number % 2]);
  const absl::StatusOr<common::ClientCredentials> made = common::MakeClientCredentials(security);
  EXPECT_THAT(made, IsOk());
  common::ChannelOptions options;
  options.credentials = made->credentials;
  const std::vector<std::string> routers = cluster.Names("router");
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (size_t i = 0; i < routers.size(); ++i) {
    channels.push_back(
        common::MakeChannel(cluster.address(routers[(std::max(number, 0) / 2 + i) % routers.size()]), options));
  }
  return router::MakeRouterClient(channels, testing::Patience());
}

constexpr absl::Duration kDrain = absl::Seconds(10);  // What a process that drains may take.

uint32_t FromEnvironment(const char* name, uint32_t otherwise) {
  const char* const text = std::getenv(name);
  uint32_t number = otherwise;
  if (text != nullptr && !absl::SimpleAtoi(text, &number)) ADD_FAILURE() << name << "='" << text << "' is no number";
  return number;
}

// What is broken now, and how it is mended.
struct Fault {
  std::string what;  // "SIGKILL worker-1"
  std::string target;
  absl::Time until;
  std::function<absl::Status()> mend;
};

class Schedule {
 public:
  Schedule(uint32_t seed, LocalCluster* cluster, SharedServers* servers)
      : random_(seed), cluster_(cluster), servers_(servers), targets_(cluster->process_names()) {
    targets_.push_back("postgres");
    targets_.push_back("s3");
  }

  // Breaks and mends until `end`, then mends everything. False: the test has failed.
  bool Run(absl::Time end, const std::function<bool()>& is_well) {
    begin_ = absl::Now();
    absl::Time next = begin_;
    while (absl::Now() < end || !faults_.empty()) {
      const absl::Time now = absl::Now();
      if (!is_well()) return false;
      for (size_t i = 0; i < faults_.size(); ++i) {
        if (now < faults_[i].until || !CanMend(faults_[i])) continue;
        const Fault fault = std::move(faults_[i]);
        faults_.erase(faults_.begin() + static_cast<int64_t>(i));
        Say(absl::StrCat("mend ", fault.what));
        const absl::Status mended = fault.mend();
        if (!mended.ok()) ADD_FAILURE() << "mending " << fault.what << ": " << mended;
        if (!mended.ok()) return false;
        break;
      }
      if (now >= next && now < end && faults_.size() < kMostFaultsAtOnce) {
        Break();
        next = absl::Now() + absl::Seconds(std::exponential_distribution<>(1 / kMeanSecondsBetweenFaults)(random_));
      }
      absl::SleepFor(absl::Milliseconds(5));  // Faults come and go by the clock.
    }
    return true;
  }

  const std::map<std::string, int>& counts() const { return counts_; }

 private:
  void Say(const std::string& what) const {
    const absl::Time now = absl::Now();
    std::fprintf(stderr, "%s %7.2f s  %s\n", absl::FormatTime("%H:%M:%E3S", now, absl::UTCTimeZone()).c_str(),
                 absl::ToDoubleSeconds(now - begin_), what.c_str());
  }

  // A process that starts waits for the servers, and mending waits for the process: servers come first.
  bool CanMend(const Fault& fault) const {
    const auto is_server = [](const Fault& one) { return one.target == "postgres" || one.target == "s3"; };
    return is_server(fault) || std::none_of(faults_.begin(), faults_.end(), is_server);
  }

  double Uniform(double low, double high) { return std::uniform_real_distribution<>(low, high)(random_); }
  int Pick(int count) { return std::uniform_int_distribution<>(0, count - 1)(random_); }

  void Break() {
    const std::string target = targets_[Pick(static_cast<int>(targets_.size()))];
    const int how = Pick(6);
    const double seconds = Uniform(0, 1) < 0.2 ? Uniform(3, 7) : Uniform(0, 2);
    for (const Fault& fault : faults_) {
      if (fault.target == target) return;
    }
    Fault fault;
    fault.target = target;
    fault.until = absl::Now() + absl::Seconds(seconds);
    if (target == "postgres") {
      // Not longer: a turn that can log nothing is given up, rightly, after --store_timeout.
      fault.until = absl::Now() + absl::Seconds(std::min(seconds, 3.0));
      const int signal = how < 2 ? SIGINT : how < 4 ? SIGQUIT : SIGKILL;
      fault.what = absl::StrCat("SIG", sigabbrev_np(signal), " postgres");
      if (signal == SIGKILL) {
        servers_->postgres->Kill();
      } else {
        servers_->postgres->Shutdown(signal);
      }
      fault.mend = [this] { return servers_->postgres->Restart(); };
    } else if (target == "s3") {
      fault.what = how < 3 ? "SIGKILL s3" : "SIGSTOP s3";
      if (how < 3) {
        servers_->s3->Kill();
        fault.mend = [this] { return servers_->s3->Restart(); };
      } else {
        servers_->s3->Freeze();
        fault.mend = [this] { return servers_->s3->Thaw(), absl::OkStatus(); };
      }
    } else if (how < 3) {
      fault.what = absl::StrCat("SIGKILL ", target);
      EXPECT_THAT(cluster_->Kill(target), IsOk());
      fault.mend = [this, target] { return cluster_->Restart(target); };
    } else if (how < 5) {
      fault.what = absl::StrCat("SIGSTOP ", target);
      EXPECT_THAT(cluster_->Freeze(target), IsOk());
      fault.mend = [this, target] { return cluster_->Thaw(target); };
    } else {
      fault.what = absl::StrCat("SIGTERM ", target);
      EXPECT_THAT(cluster_->BeginTerminate(target), IsOk());
      fault.until += kDrain;  // Or the schedule would wait for it.
      fault.mend = [this, target] {
        const absl::Status drained = cluster_->Terminate(target);
        return drained.ok() ? cluster_->Restart(target) : drained;
      };
    }
    Say(absl::StrCat(fault.what, ", for ",
                     absl::FormatDuration(absl::Trunc(fault.until - absl::Now(), absl::Milliseconds(1)))));
    ++counts_[fault.what];
    faults_.push_back(std::move(fault));
  }

  std::mt19937 random_;
  LocalCluster* const cluster_;
  SharedServers* const servers_;
  std::vector<std::string> targets_;
  std::vector<Fault> faults_;
  std::map<std::string, int> counts_;
  absl::Time begin_;
};

TEST(ChaosTest, EveryStreamIsThatOfAnUndisturbedRun) {
  const uint32_t seed = FromEnvironment("CHAOS_SEED", std::random_device()());
  const uint32_t seconds = FromEnvironment("CHAOS_SECONDS", 75);
  const uint32_t clients = FromEnvironment("CHAOS_CLIENTS", 12);
  std::fprintf(stderr, "chaos: CHAOS_SEED=%u CHAOS_SECONDS=%u CHAOS_CLIENTS=%u\n", seed, seconds, clients);
  auto servers = SharedServers::Launch();
  if (absl::IsFailedPrecondition(servers.status())) GTEST_SKIP() << servers.status().message();
  ASSERT_THAT(servers, IsOk());
  auto options = testing::TwoOfEverything(*servers, /*slots=*/std::max(8, static_cast<int>(clients) / 2));
  ASSERT_THAT(options, IsOk());
  AddTenants(&*options);
  auto cluster = LocalCluster::Start(*options);
  ASSERT_THAT(cluster, IsOk());
  Conversations::Options conversations_options;
  conversations_options.count = static_cast<int>(clients);
  conversations_options.stories = 4;
  // Each session begins as all do: with a state that is in the prefix cache, if chaos has left one.
  conversations_options.turns_per_session = 3;
  conversations_options.shared_tokens = 600;
  conversations_options.limit = absl::Minutes(2);
  Conversations conversations([&](int number) { return TenantsClient(**cluster, number); }, conversations_options);
  conversations.Start();
  ASSERT_FALSE(::testing::Test::HasFailure());

  Schedule schedule(seed, cluster->get(), &*servers);
  ASSERT_TRUE(schedule.Run(absl::Now() + absl::Seconds(seconds), [&] { return conversations.NoneFailed(); }))
      << "CHAOS_SEED=" << seed;
  ASSERT_THAT((*cluster)->WaitUntilServing(), IsOk());
  conversations.ExpectProgress();
  conversations.Stop();
  int faults = 0;
  for (const auto& [what, count] : schedule.counts()) {
    std::fprintf(stderr, "%4d x %s\n", count, what.c_str());
    faults += count;
  }
  std::fprintf(
      stderr,
      "chaos: seed %u, %d faults, %d turns of %d tokens, %llu tokens of input reused, the longest pause %.1f s (%s)\n",
      seed, faults, conversations.turns(), conversations_options.tokens_per_turn,
      static_cast<unsigned long long>(conversations.reused_tokens()),
      absl::ToDoubleSeconds(conversations.longest_pause()), conversations.longest_pause_of().c_str());
  EXPECT_GT(conversations.reused_tokens(), 0);
  conversations.Compare();
  EXPECT_FALSE(::testing::Test::HasFailure()) << "CHAOS_SEED=" << seed;
}

}  // namespace
}  // namespace rwkv
