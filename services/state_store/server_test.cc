// The process itself: started, killed at any moment, started again.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/state_store_client.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using testing::HasSubstr;
using testing::IsOk;

constexpr absl::Duration kLimit = absl::Seconds(60);  // Generous: sanitizers on a busy machine are slow.

absl::Time Deadline() { return absl::Now() + kLimit; }

class ServerTest : public ::testing::Test {
 protected:
  ServerTest() : folder_(NewTestFolder()) {}
  ~ServerTest() override {
    if (pid_ > 0) Kill();
  }

  std::string log() const { return testing::ReadFile(folder_ + "/log"); }

  void Spawn(const std::string& data_dir, const std::vector<std::string>& more_flags = {}) {
    const char* runfiles = std::getenv("TEST_SRCDIR");
    const char* workspace = std::getenv("TEST_WORKSPACE");
    ASSERT_TRUE(runfiles != nullptr && workspace != nullptr) << "run by bazel test";
    const std::string binary = absl::StrCat(runfiles, "/", workspace, "/services/state_store/state_store");
    std::vector<std::string> arguments = {binary,
                                          "--name=state_store-0",
                                          "--listen=127.0.0.1:0",
                                          "--metrics_listen=127.0.0.1:0",
                                          "--data_dir=" + data_dir,
                                          "--port_file=" + port_file()};
    arguments.insert(arguments.end(), more_flags.begin(), more_flags.end());
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    unlink(port_file().c_str());
    const std::string log_path = folder_ + "/log";
    pid_ = fork();
    ASSERT_GE(pid_, 0);
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      const int log_fd = open(log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
      dup2(log_fd, STDERR_FILENO);
      execv(argv[0], argv.data());
      _exit(127);
    }
  }

  // Exit status of wait(2).
  int Wait() {
    int status = -1;
    if (!Eventually([&] { return waitpid(pid_, &status, WNOHANG) == pid_; })) {
      ADD_FAILURE() << "the process does not end: " << log();
      kill(pid_, SIGKILL);
      waitpid(pid_, &status, 0);
    }
    pid_ = -1;
    return status;
  }

  void Start(const std::vector<std::string>& more_flags = {}) {
    Spawn(folder_ + "/data", more_flags);
    const absl::Time limit = Deadline();
    while (access(port_file().c_str(), F_OK) != 0) {
      int status = 0;
      ASSERT_EQ(waitpid(pid_, &status, WNOHANG), 0) << "it ended: " << log();
      ASSERT_LT(absl::Now(), limit) << log();
      std::this_thread::yield();
    }
    for (const std::string& line : std::vector<std::string>(absl::StrSplit(testing::ReadFile(port_file()), '\n'))) {
      if (absl::StartsWith(line, "grpc=")) address_ = line.substr(5);
    }
    channel_ = common::MakeChannel(address_);
    catalog_ = NewCatalogClient(channel_);
    records_ = NewRecordsClient(channel_);
  }

  void Kill() {
    kill(pid_, SIGKILL);
    const int status = Wait();
    EXPECT_TRUE(WIFSIGNALED(status)) << log();
  }

  v1::Lease Create(const std::string& session_id) {
    v1::CreateSessionRequest create;
    create.set_session_id(session_id);
    EXPECT_OK(catalog_->CreateSession(create, Deadline()));
    return Acquire(session_id);
  }

  v1::Lease Acquire(const std::string& session_id) {
    v1::AcquireLeaseRequest request;
    request.set_session_id(session_id);
    request.set_holder("router-0");
    request.set_incarnation("1");
    request.mutable_ttl()->set_seconds(3600);
    const auto response = catalog_->AcquireLease(request, Deadline());
    EXPECT_OK(response);
    return response.ok() ? response->lease() : v1::Lease();
  }

  absl::StatusOr<v1::BeginTurnResponse> Begin(const v1::Lease& lease, const std::string& request_id,
                                              std::vector<uint32_t> tokens) {
    v1::BeginTurnRequest request;
    *request.mutable_lease() = lease;
    request.set_request_id(request_id);
    request.mutable_token_ids()->Add(tokens.begin(), tokens.end());
    request.set_model_fingerprint(kTestModel);
    return catalog_->BeginTurn(request, Deadline());
  }

  std::string port_file() const { return folder_ + "/ports"; }

  const std::string folder_;
  pid_t pid_ = -1;
  std::string address_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<CatalogClient> catalog_;
  std::unique_ptr<RecordsClient> records_;
};

TEST_F(ServerTest, EverythingAcknowledgedIsThereAfterKillsInTheMiddleOfAppends) {
  constexpr int kSessions = 4;
  Start();
  if (HasFatalFailure()) return;
  std::vector<v1::Lease> leases;
  for (int i = 0; i < kSessions; ++i) {
    leases.push_back(Create(absl::StrCat("s", i)));
    ASSERT_OK(Begin(leases.back(), "r", {}));
  }
  std::vector<uint64_t> lengths(kSessions, 0);  // As the last start found them.
  for (int kill = 0; kill < 3; ++kill) {
    std::atomic<uint64_t> acknowledged[kSessions];
    std::vector<std::thread> writers;
    for (int i = 0; i < kSessions; ++i) {
      acknowledged[i] = lengths[i];
      writers.emplace_back([&, i] {
        for (;;) {
          v1::AppendTokensRequest request;
          *request.add_items() = TestAppend(leases[i], "r", acknowledged[i], {static_cast<uint32_t>(acknowledged[i])});
          const auto response = catalog_->AppendTokens(request, Deadline());
          if (!response.ok()) return;
          ASSERT_EQ(response->statuses(0).code(), 0) << response->statuses(0).message();
          ++acknowledged[i];
        }
      });
    }
    EXPECT_TRUE(Eventually([&] { return acknowledged[0] >= lengths[0] + 20; })) << "appends do not come: " << log();
    Kill();
    for (std::thread& writer : writers) writer.join();
    Start();
    if (HasFatalFailure()) return;
    for (int i = 0; i < kSessions; ++i) {
      EXPECT_GE(acknowledged[i], lengths[i]);
      ASSERT_OK_AND_ASSIGN(const v1::BeginTurnResponse turn, Begin(leases[i], "r", {}));
      EXPECT_TRUE(turn.existed());
      lengths[i] = turn.session_tokens();
      // One append may have happened without an answer.
      EXPECT_GE(lengths[i], acknowledged[i]);
      EXPECT_LE(lengths[i], acknowledged[i] + 1);
      v1::ReadTokensRequest read;
      read.set_session_id(absl::StrCat("s", i));
      read.set_end(lengths[i]);
      ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, catalog_->ReadTokens(read, Deadline()));
      for (uint32_t t = 0; t < tokens.size(); ++t) ASSERT_EQ(tokens[t], t);
    }
    EXPECT_GE(lengths[0], 20u);
  }
}

TEST_F(ServerTest, SnapshotAndLeaseSurviveAKill) {
  Start();
  if (HasFatalFailure()) return;
  const v1::Lease lease = Create("s");
  ASSERT_OK(Begin(lease, "r", {1, 2, 3}));
  const std::string data = TestRecordData(1, 3 << 20);
  v1::CommitSnapshotRequest commit;
  *commit.mutable_lease() = lease;
  v1::SnapshotManifest& manifest = *commit.mutable_manifest();
  manifest.set_snapshot_id("x");
  manifest.set_session_id("s");
  manifest.set_position(3);
  manifest.set_model_fingerprint(kTestModel);
  *manifest.add_records() = TestRecordInfo("x", 0, data);
  ASSERT_OK(records_->PutRecord(manifest.records(0), data, nullptr, Deadline()));
  v1::AcquireLeaseRequest acquire;
  acquire.set_session_id("s");
  acquire.set_holder("router-0");
  acquire.set_incarnation("1");
  acquire.mutable_ttl()->set_seconds(3600);
  ASSERT_OK_AND_ASSIGN(const v1::AcquireLeaseResponse grant, catalog_->AcquireLease(acquire, Deadline()));
  EXPECT_EQ(grant.lease().fencing_token(), lease.fencing_token());
  commit.set_log_branch(grant.log_branch());
  ASSERT_OK(catalog_->CommitSnapshot(commit, Deadline()));
  Kill();
  Start();
  if (HasFatalFailure()) return;
  v1::FindSnapshotRequest find;
  find.set_session_id("s");
  find.set_at_or_before(3);
  find.set_model_fingerprint(kTestModel);
  ASSERT_OK_AND_ASSIGN(const v1::FindSnapshotResponse found, catalog_->FindSnapshot(find, Deadline()));
  ASSERT_TRUE(found.has_manifest());
  EXPECT_THAT(records_->GetRecord(found.manifest().records(0), Deadline()), testing::IsOkAndHolds(data));
  acquire.set_holder("router-1");
  EXPECT_THAT(catalog_->AcquireLease(acquire, Deadline()), testing::StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(Begin(lease, "q", {4}), IsOk());
}

TEST_F(ServerTest, SaysWhoItIsAndDrainsOnSigterm) {
  Start();
  if (HasFatalFailure()) return;
  ASSERT_OK_AND_ASSIGN(const v1::StateCatalogDescribeResponse description, catalog_->Describe({}, Deadline()));
  EXPECT_EQ(description.name(), "state_store-0");
  EXPECT_EQ(description.pid(), pid_);
  EXPECT_THAT(description.metrics_address(), HasSubstr("127.0.0.1:"));
  kill(pid_, SIGTERM);
  const int status = Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << log();
}

TEST_F(ServerTest, SessionsEndAfterTheirIdleTimeAndAreNotFoundInWords) {
  Start();
  if (HasFatalFailure()) return;
  v1::CreateSessionRequest create;
  create.set_session_id("s");
  ASSERT_OK(catalog_->CreateSession(create, Deadline()));
  v1::GetSessionRequest get;
  get.set_session_id("s");
  ASSERT_OK(catalog_->GetSession(get, Deadline()));
  Kill();
  Start({"--session_idle_ttl=1ms"});  // It sweeps at once.
  if (HasFatalFailure()) return;
  absl::Status status;
  EXPECT_TRUE(Eventually([&] { return !(status = catalog_->GetSession(get, Deadline()).status()).ok(); })) << log();
  EXPECT_THAT(status, testing::StatusIs(absl::StatusCode::kNotFound,
                                        HasSubstr("session s does not exist; it may have ended: sessions end after "
                                                  "1ms without use")));
  EXPECT_THAT(log(), HasSubstr("session_ended session=s reason=idle"));
}

TEST_F(ServerTest, BoundsHoldOverTheWire) {
  Start({"--max_sessions=1"});
  if (HasFatalFailure()) return;
  v1::CreateSessionRequest create;
  create.set_session_id("s");
  ASSERT_OK(catalog_->CreateSession(create, Deadline()));
  create.set_session_id("t");
  const absl::Status full = catalog_->CreateSession(create, Deadline()).status();
  EXPECT_THAT(full, testing::StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1 sessions, --max_sessions=1")));
  EXPECT_EQ(common::GetErrorReason(full), "STORE_FULL");
  Kill();
  Start({"--max_stored_bytes=1", "--when_full=evict"});
  if (HasFatalFailure()) return;
  const v1::Lease lease = Acquire("s");
  ASSERT_OK(Begin(lease, "r", {1}));
  EXPECT_THAT(Begin(lease, "q", {2}), testing::StatusIs(absl::StatusCode::kResourceExhausted,
                                                        HasSubstr("8 bytes are stored, --max_stored_bytes=1")));
}

TEST_F(ServerTest, BadLimitsEndItWithAReason) {
  for (const auto& [flag, words] : std::vector<std::pair<std::string, std::string>>{
           {"--when_full=drop", "want refuse or evict"},
           {"--when_full=evict", "without --max_stored_bytes or --max_sessions"},
           {"--max_sessions=-1", "--max_sessions=-1, want 0"},
           {"--max_stored_bytes=-1", "--max_stored_bytes=-1, want 0"},
           {"--session_idle_ttl=-1s", "--session_idle_ttl=-1s, want 0"}}) {
    Spawn(folder_ + "/data", {flag});
    if (HasFatalFailure()) return;
    const int status = Wait();
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1) << flag;
    EXPECT_THAT(log(), HasSubstr(words));
  }
}

TEST_F(ServerTest, SecondProcessOnOneFolderIsRefusedWithAReason) {
  Start();
  if (HasFatalFailure()) return;
  const pid_t first = pid_;
  Spawn(folder_ + "/data");
  if (HasFatalFailure()) return;
  const int status = Wait();
  pid_ = first;
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1);
  EXPECT_THAT(log(), HasSubstr("in use by another process"));
}

TEST_F(ServerTest, BadFolderEndsItWithAReason) {
  std::ofstream(folder_ + "/file") << "x";
  Spawn(folder_ + "/file");
  if (HasFatalFailure()) return;
  int status = Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1);
  EXPECT_THAT(log(), HasSubstr("is not a directory"));
  Spawn("");
  if (HasFatalFailure()) return;
  status = Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1);
  EXPECT_THAT(log(), HasSubstr("--data_dir is required"));
}

}  // namespace
}  // namespace rwkv::state_store
