// Files that change while a process runs.
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "services/common/rpc_server.h"
#include "services/common/security/security.h"
#include "services/common/security/security_fixture.h"
#include "tests/testing/certificates.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::TestAuthority;
using ::rwkv::testing::TlsFolder;
using ::testing::HasSubstr;
using ::testing::Not;

// Calls all the time, over a connection that stays and over new ones.
class Load {
 public:
  Load(std::function<std::shared_ptr<grpc::Channel>()> dial) : dial_(std::move(dial)) {
    threads_.emplace_back([this, channel = dial_()] {
      while (!stop_.HasBeenNotified()) Count(Call(channel, kGetStatus));
    });
    threads_.emplace_back([this] {
      while (!stop_.HasBeenNotified()) Count(Call(dial_(), kGetStatus));
    });
  }
  ~Load() { Stop(); }
  void Stop() {
    if (!stop_.HasBeenNotified()) stop_.Notify();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }
  int calls() const { return calls_; }
  std::vector<std::string> failures() const {
    absl::MutexLock lock(&mu_);
    return failures_;
  }
  bool AwaitCalls(int more) const {
    const int target = calls_ + more;
    return testing::WaitUntil([&] { return calls_ >= target; }, kPatience);
  }

 private:
  void Count(const absl::Status& status) {
    ++calls_;
    if (status.ok()) return;
    absl::MutexLock lock(&mu_);
    failures_.push_back(status.ToString());
  }
  const std::function<std::shared_ptr<grpc::Channel>()> dial_;
  absl::Notification stop_;
  std::atomic<int> calls_{0};
  mutable absl::Mutex mu_;
  std::vector<std::string> failures_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> threads_;
};

TEST_F(SecurityTest, KeysCertificatesAndAuthoritiesChangeWithoutAFailedCall) {
  Serve("router");
  const std::unique_ptr<Security> client =
      Make(Files("client", authority_.IssueRole("operator"), authority_.certificate()));
  TlsFolder server_files(::testing::TempDir() + "/server");
  TlsFolder client_files(::testing::TempDir() + "/client");
  TestAuthority next("next");
  // Where the client serves: whether its watcher has seen the new files is asked by knocking, as it is of the server.
  StatusService service;
  RpcServer::Options knock_options;
  knock_options.credentials = client->ForServer();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> client_door, RpcServer::Start(knock_options, {&service}));
  const auto await = [&](const char* what, const TestAuthority::Pair& shown, const std::string& believed) {
    for (const std::string& address : {server_->address(), client_door->address()}) {
      ASSERT_TRUE(testing::WaitUntil(
          [&] { return Call(DialWith(shown, address, believed), kGetStatus, kRefusal).ok(); }, kPatience))
          << address << " does not know of: " << what;
    }
  };

  Load load([&] { return Dial(*client); });
  ASSERT_TRUE(load.AwaitCalls(20));
  // First all believe both authorities, then certificates change, then the old authority goes.
  const std::string both = authority_.certificate() + next.certificate();
  server_files.WriteAuthorities(both);
  client_files.WriteAuthorities(both);
  await("both authorities", next.IssueRole("operator"), authority_.certificate());
  server_files.Write(next.IssueRole("router"));
  client_files.Write(next.IssueRole("operator"));
  await("the new certificate", authority_.IssueRole("operator"), next.certificate());
  server_files.WriteAuthorities(next.certificate());
  client_files.WriteAuthorities(next.certificate());
  for (const std::string& address : {server_->address(), client_door->address()}) {
    const auto believes = [&] {
      return Call(DialWith(authority_.IssueRole("operator"), address, next.certificate()), kGetStatus, kRefusal).ok();
    };
    ASSERT_TRUE(testing::WaitUntil([&] { return !believes(); }, kPatience))
        << address << " still believes the old authority";
  }
  ASSERT_TRUE(load.AwaitCalls(20));
  load.Stop();
  EXPECT_THAT(load.failures(), ::testing::IsEmpty()) << "of " << load.calls() << " calls";
}

TEST_F(SecurityTest, FilesThatAreOfNoUseShowInTheMetricAndNewConnectionsDoNotNotice) {
  Serve("router");
  EXPECT_THAT(Scrape(), Not(HasSubstr("rwkv_tls_expiry_timestamp_seconds file=certificate 0\n")));
  const auto old_connection = DialAs("operator");
  ASSERT_THAT(Call(old_connection, kGetStatus), IsOk());
  TlsFolder files(::testing::TempDir() + "/server");
  // What tells that gRPC has looked at what there is to see: a client that believes the next authority alone.
  TestAuthority next("next");
  const auto is_let_in = [&](const TestAuthority& believed) {
    return Call(DialWith(authority_.IssueRole("operator"), server_->address(), believed.certificate()), kGetStatus,
                kRefusal)
        .ok();
  };
  const TestAuthority::Pair right = authority_.IssueRole("router"), other = authority_.IssueRole("worker");
  const std::string ours = authority_.certificate();
  const TestAuthority::Pair pairs[] = {{right.certificate, other.key},
                                       {right.certificate.substr(0, 200), right.key},
                                       {"", ""},
                                       other,
                                       next.IssueRole("router")};
  for (const TestAuthority::Pair& pair : pairs) {
    files.Write(pair);
    // Longer than gRPC takes to see a change: new clients come and go meanwhile.
    for (const absl::Time end = absl::Now() + absl::Seconds(2); absl::Now() < end;) {
      ASSERT_TRUE(is_let_in(authority_)) << "with " << pair.certificate.size() << " bytes of a certificate";
    }
    EXPECT_THAT(Scrape(), ::testing::AnyOf(HasSubstr("rwkv_tls_expiry_timestamp_seconds file=certificate 0\n"),
                                           HasSubstr("rwkv_tls_expiry_timestamp_seconds file=authorities 0\n")));
    EXPECT_THAT(Call(old_connection, kGetStatus), IsOk());
  }
  files.WriteAuthorities(ours + next.certificate());
  ASSERT_TRUE(testing::WaitUntil([&] { return is_let_in(next); }, kPatience)) << "the new pair is not taken up";
  EXPECT_THAT(Scrape(), Not(HasSubstr("rwkv_tls_expiry_timestamp_seconds file=certificate 0\n")));
  EXPECT_THAT(Scrape(), Not(HasSubstr("rwkv_tls_expiry_timestamp_seconds file=authorities 0\n")));
  EXPECT_THAT(Call(old_connection, kGetStatus), IsOk());
}

}  // namespace
}  // namespace rwkv::common
