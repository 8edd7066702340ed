// Whole clusters whose workers compute on emulated GPUs and pass rows by a fake NCCL: they say what CPUs say, whatever
// happens to them. What the fakes see that must not be done ends a worker badly, and with it the test.
#include <sys/wait.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/client/router_client.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::LocalCluster;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::SizeIs;

using Tokens = std::vector<uint32_t>;

constexpr int kDeviceLost = 70;
const char* const kWorkers[] = {"worker-0", "worker-1"};

std::string ModelPath() {
  static const std::string* const path = [] {
    testing::RandomModelOptions options;
    options.layers = 3;
    options.width = 32;
    options.head_size = 16;
    auto* path = new std::string(absl::StrCat(::testing::TempDir(), "/gpu.safetensors"));
    const absl::Status status = testing::WriteRandomModel(options, *path);
    if (!status.ok()) ADD_FAILURE() << status;
    return path;
  }();
  return *path;
}

Tokens Prompt(size_t size, uint32_t seed = 1) {
  Tokens prompt;
  for (uint32_t i = 0; i < size; ++i) prompt.push_back((i * i + 7 * i + seed) % 101);
  return prompt;
}

LocalCluster::Options Cpus(int stages) {
  LocalCluster::Options options;
  options.model = ModelPath();
  options.stages = stages;
  return options;
}

LocalCluster::Options Gpus(int stages) {
  LocalCluster::Options options = Cpus(stages);
  options.worker_binary = "services/worker/testing/emulated_worker";
  options.worker_flags = {"--device=cuda/emulated", "--max_batch_tokens=8"};
  if (stages > 1) options.worker_flags.push_back("--link=nccl");
  return options;
}

absl::StatusOr<Tokens> Generate(
    RouterClient& client, const Tokens& prompt, uint32_t max_tokens,
    const std::function<void(size_t)>& on_token = [](size_t) {}) {
  v1::GenerateRequest request;
  request.mutable_tokens()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_tokens(max_tokens);
  Tokens tokens;
  RWKV_RETURN_IF_ERROR(client.Generate(request, [&](const v1::GenerateResponse& response) -> absl::Status {
    if (!response.has_token_id()) return absl::OkStatus();
    if (response.index() != tokens.size()) {
      return absl::DataLossError(absl::StrCat("index ", response.index(), " after ", tokens.size(), " tokens"));
    }
    tokens.push_back(response.token_id());
    on_token(tokens.size());
    return absl::OkStatus();
  }));
  return tokens;
}

absl::StatusOr<Tokens> Generate(const LocalCluster& cluster, const Tokens& prompt, uint32_t max_tokens) {
  return Generate(*MakeRouterClient(cluster.Channel("router-0")), prompt, max_tokens);
}

absl::StatusOr<std::string> Logits(const LocalCluster& cluster, const Tokens& tokens) {
  v1::LogitsRequest request;
  request.mutable_tokens()->mutable_ids()->Assign(tokens.begin(), tokens.end());
  std::string rows;
  RWKV_RETURN_IF_ERROR(MakeRouterClient(cluster.Channel("router-0"))->Logits(request, [&](const auto& response) {
    rows += response.logits();
    return absl::OkStatus();
  }));
  return rows;
}

TEST(EmulatedGpuTest, OneTwoAndThreeStagesSayWhatCpusSay) {
  const Tokens prompt = Prompt(21);
  Tokens expected;
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Cpus(2)));
    ASSERT_OK_AND_ASSIGN(expected, Generate(*cluster, prompt, 256));
    EXPECT_THAT(expected, SizeIs(256));
  }
  std::string first_rows;
  for (const int stages : {1, 2, 3}) {
    SCOPED_TRACE(absl::StrCat(stages, " stages"));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(Gpus(stages)));
    EXPECT_THAT(Generate(*cluster, prompt, 256), IsOkAndHolds(ElementsAreArray(expected)));
    ASSERT_OK_AND_ASSIGN(const std::string rows, Logits(*cluster, prompt));
    if (stages == 1) first_rows = rows;
    EXPECT_TRUE(rows == first_rows) << "the logits differ in some bit";
    if (stages > 1) EXPECT_THAT(cluster->Log("worker-1"), HasSubstr("link_opened end=receive")) << "no NCCL was used";
  }
}

TEST(EmulatedGpuTest, CompanyChangesNothing) {
  constexpr int kClients = 6;
  LocalCluster::Options options = Gpus(2);
  options.worker_flags.push_back("--eager");
  options.worker_flags.push_back("--fake_nccl=slow=1ms");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
  std::vector<Tokens> solo;
  for (int i = 0; i < kClients; ++i) {
    ASSERT_OK_AND_ASSIGN(solo.emplace_back(), Generate(*cluster, Prompt(1 + 3 * i, i), 16));
  }
  std::vector<absl::StatusOr<Tokens>> together(kClients, absl::UnknownError("did not run"));
  std::vector<std::thread> threads;
  for (int i = 0; i < kClients; ++i) {
    threads.emplace_back([&, i] { together[i] = Generate(*cluster, Prompt(1 + 3 * i, i), 16); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kClients; ++i) {
    EXPECT_THAT(together[i], IsOkAndHolds(ElementsAreArray(solo[i]))) << "client " << i;
  }
}

// Gpus and CPUs make no pipeline with NCCL, and one of GPUs may be told to use gRPC.
TEST(EmulatedGpuTest, GrpcCarriesTheRowsWhereItShall) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> nccl, LocalCluster::Start(Gpus(2)));
  ASSERT_OK_AND_ASSIGN(const Tokens expected, Generate(*nccl, Prompt(9), 12));
  LocalCluster::Options options = Gpus(2);
  options.worker_flags.back() = "--link=grpc";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> grpc, LocalCluster::Start(options));
  EXPECT_THAT(Generate(*grpc, Prompt(9), 12), IsOkAndHolds(ElementsAreArray(expected)));
  options = Cpus(2);
  options.worker_flags = {"--link=nccl"};
  EXPECT_THAT(LocalCluster::StartWithoutWaiting(options).status(),
              testing::StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is no GPU")));
}

// A cluster in which things happen, and what it said when nothing did.
class DisturbedTest : public ::testing::Test {
 protected:
  static constexpr size_t kPrompt = 100;  // In 13 steps.
  static constexpr uint32_t kTokens = 40;

  void SetUp() override {
    LocalCluster::Options options = Gpus(2);
    options.worker_flags.push_back("--link_timeout=2s");
    options.worker_flags.push_back("--hang_limit=2s");
    ASSERT_OK_AND_ASSIGN(cluster_, LocalCluster::Start(options));
    ASSERT_OK_AND_ASSIGN(expected_, Generate(*cluster_, Prompt(kPrompt), kTokens));
    ASSERT_THAT(expected_, SizeIs(kTokens));
  }

  // A turn during which `disturb` happens, on this thread. It begins once `tokens` are there (0: at once).
  void ExpectUndisturbed(const std::string& what, size_t tokens, const std::function<absl::Status()>& disturb) {
    SCOPED_TRACE(what);
    absl::Notification begun;
    absl::StatusOr<Tokens> said = absl::UnknownError("did not run");
    std::thread turn([&] {
      const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster_->Channel("router-0"));
      if (tokens == 0) begun.Notify();
      said = Generate(*client, Prompt(kPrompt), kTokens, [&](size_t count) {
        if (count == tokens) begun.Notify();
      });
      if (!begun.HasBeenNotified()) begun.Notify();
    });
    begun.WaitForNotification();
    EXPECT_OK(disturb());
    turn.join();
    EXPECT_THAT(said, IsOkAndHolds(ElementsAreArray(expected_)));
    EXPECT_OK(cluster_->WaitUntilServing());
  }

  absl::Status KillAndRestart(const std::string& name, const std::vector<std::string>& flags = {}) {
    RWKV_RETURN_IF_ERROR(cluster_->Kill(name));
    return cluster_->Restart(name, flags);
  }
  // With faults that come later.
  void Prepare(const std::string& name, const std::vector<std::string>& flags) {
    ASSERT_OK(KillAndRestart(name, flags));
    ASSERT_OK(cluster_->WaitUntilServing());
  }
  // It ends by itself, and is started again.
  absl::Status Replace(const std::string& name, int status) {
    RWKV_ASSIGN_OR_RETURN(const int wait_status, cluster_->WaitUntilGone(name));
    const int got = WIFSIGNALED(wait_status) ? -WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
    if (got != status) return absl::InternalError(absl::StrCat(name, " ended with ", got, ", not ", status));
    return cluster_->Restart(name);
  }
  // Silent for longer than anybody waits.
  absl::Status FreezeForAWhile(const std::string& name) {
    const std::string other = name == "worker-0" ? "worker-1" : "worker-0";
    const size_t ended = Count(other, "epoch_ended");
    RWKV_RETURN_IF_ERROR(cluster_->Freeze(name));
    RWKV_RETURN_IF_ERROR(WaitForLog(other, "epoch_ended", ended + 1));
    return cluster_->Thaw(name);
  }
  // Until the process has written `text` so many times.
  absl::Status WaitForLog(const std::string& name, const std::string& text, size_t times) {
    if (testing::WaitUntil([&] { return Count(name, text) >= times; })) return absl::OkStatus();
    return absl::DeadlineExceededError(absl::StrCat(name, " never says ", text));
  }
  size_t Count(const std::string& name, const std::string& text) const {
    const std::string log = cluster_->Log(name);
    size_t count = 0;
    for (size_t at = log.find(text); at != std::string::npos; at = log.find(text, at + 1)) ++count;
    return count;
  }

  std::unique_ptr<LocalCluster> cluster_;
  Tokens expected_;
};

TEST_F(DisturbedTest, WorkersAreKilledInEveryPhase) {
  for (const char* worker : kWorkers) {
    ExpectUndisturbed(absl::StrCat(worker, " in decode"), 10, [&] { return KillAndRestart(worker); });
    // At its seventh transfer, which is a prefill's; warm-ups have none.
    Prepare(worker, {"--fake_nccl=die_at=7"});
    ExpectUndisturbed(absl::StrCat(worker, " in prefill"), 0, [&] { return Replace(worker, -SIGKILL); });
    ExpectUndisturbed(absl::StrCat(worker, " while opening"), 10, [&]() -> absl::Status {
      const size_t opened = Count("worker-1", "epoch_opened");
      RWKV_RETURN_IF_ERROR(KillAndRestart(worker, {"--fake_nccl=never_ready=true"}));
      RWKV_RETURN_IF_ERROR(WaitForLog("worker-1", "epoch_opened", opened + 1));  // And its pair is not there.
      return KillAndRestart(worker);
    });
  }
}

TEST_F(DisturbedTest, WorkersAreSilentInEveryPhase) {
  for (const char* worker : kWorkers) {
    ExpectUndisturbed(absl::StrCat(worker, " frozen in decode"), 10, [&] { return FreezeForAWhile(worker); });
    ExpectUndisturbed(absl::StrCat(worker, " frozen in prefill"), 0, [&] { return FreezeForAWhile(worker); });
    const char* const other = worker == kWorkers[0] ? kWorkers[1] : kWorkers[0];
    ExpectUndisturbed(absl::StrCat(worker, " frozen while opening"), 10, [&]() -> absl::Status {
      RWKV_RETURN_IF_ERROR(cluster_->Freeze(worker));
      RWKV_RETURN_IF_ERROR(KillAndRestart(other));
      return cluster_->Thaw(worker);
    });
  }
}

// The link alone is made anew: the processes stay.
TEST_F(DisturbedTest, TransfersHangOrFailAndThePairIsMadeAnew) {
  for (const char* worker : kWorkers) {
    for (const char* fault : {"hang_at=5", "hang_at=30", "fail_at=5", "fail_at=30"}) {
      Prepare(worker, {absl::StrCat("--fake_nccl=", fault)});
      const pid_t before[] = {cluster_->pid(kWorkers[0]), cluster_->pid(kWorkers[1])};
      ExpectUndisturbed(absl::StrCat(worker, " ", fault), 0, [] { return absl::OkStatus(); });
      EXPECT_EQ(cluster_->pid(kWorkers[0]), before[0]);
      EXPECT_EQ(cluster_->pid(kWorkers[1]), before[1]);
      EXPECT_THAT(cluster_->Log(worker), HasSubstr("epoch_ended"));
    }
  }
}

// What no epoch can mend ends the process, in words and soon, and the next one goes on.
TEST_F(DisturbedTest, GpusThatFaultOrHangAndAbortsThatHangEndTheWorker) {
  for (const char* worker : kWorkers) {
    for (const std::vector<std::string>& flags : std::vector<std::vector<std::string>>{
             {"--fail_launch=300"}, {"--hang_launch=300"}, {"--fake_nccl=hang_at=20,abort_hangs=true"}}) {
      const size_t before = Count(worker, "device_lost");
      Prepare(worker, flags);
      ExpectUndisturbed(absl::StrCat(worker, " ", flags[0]), 0, [&] { return Replace(worker, kDeviceLost); });
      EXPECT_EQ(Count(worker, "device_lost"), before + 1);
    }
  }
  EXPECT_THAT(cluster_->Log("worker-0"), HasSubstr("cudaErrorIllegalAddress"));
  EXPECT_THAT(cluster_->Log("worker-0"), HasSubstr("the GPU hangs"));
  EXPECT_THAT(cluster_->Log("worker-0"), HasSubstr("abort of a communicator hangs"));
}

}  // namespace
}  // namespace rwkv
