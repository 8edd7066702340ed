// Clusters on emulated GPUs, joined by a fake NCCL, in which workers are killed, silent, or lose their GPU or their link,
// in every phase: they say what they say when nothing happens.
#include <signal.h>
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
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_tensors.h"
#include "services/router/client/router_client.h"
#include "tests/integration/gpu_clusters.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::checkpoint::ModelVersion;
using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::StatusIs;
using ::testing::ContainsRegex;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int kDeviceLost = 70;
const char* const kWorkers[] = {"worker-0", "worker-1"};

// A cluster in which things happen, and what it said when nothing did.
class Disturbances : public ::testing::Test {
 protected:
  static constexpr size_t kPrompt = 100;  // In 13 steps.
  static constexpr uint32_t kTokens = 40;

  void Start(LocalCluster::Options options) {
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

// RWKV-7b's workers wait for their device before each step, where the others wait only behind it.
class DisturbedTest : public Disturbances, public ::testing::WithParamInterface<ModelVersion> {
 protected:
  void SetUp() override { Start(Gpus(2, GetParam())); }
};

TEST_P(DisturbedTest, WorkersAreKilledInEveryPhase) {
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

TEST_P(DisturbedTest, WorkersAreSilentInEveryPhase) {
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
TEST_P(DisturbedTest, TransfersHangOrFailAndThePairIsMadeAnew) {
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
TEST_P(DisturbedTest, GpusThatFaultOrHangAndAbortsThatHangEndTheWorker) {
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

// An uncorrectable error of memory, which a call of the runtime or a copy meets: the worker ends in words, and the next
// one goes on.
TEST_P(DisturbedTest, MemoryOfAGpuThatBreaksEndsTheWorker) {
  for (const char* worker : kWorkers) {
    for (const int moment : {SIGUSR1, SIGUSR2}) {
      for (const size_t tokens : {0, 10}) {
        const size_t before = Count(worker, "device_lost");
        ExpectUndisturbed(absl::StrCat(worker, moment == SIGUSR1 ? " call" : " copy", " after ", tokens), tokens, [&] {
          kill(cluster_->pid(worker), moment);
          return Replace(worker, kDeviceLost);
        });
        EXPECT_EQ(Count(worker, "device_lost"), before + 1);
      }
    }
    EXPECT_GE(Count(worker, "cudaErrorECCUncorrectable"), 4u);
  }
}

// With products by a library, whose faults are no faults of the device.
class DisturbedLibraryTest : public Disturbances {
 protected:
  void SetUp() override {
    LocalCluster::Options options = Gpus(2);
    options.worker_flags[0] = "--device=cuda/emulated/lt";
    Start(options);
  }
};

// A call that fails, once it has done well in a warm-up: a prefill's. The worker ends and says which; the next one goes
// on. Of a lack of memory the pipeline alone is made anew.
TEST_F(DisturbedLibraryTest, AProductThatFailsEndsTheWorker) {
  for (const char* worker : kWorkers) {
    for (const auto& [result, name] : std::vector<std::pair<int, std::string>>{
             {8, "ARCH_MISMATCH"}, {13, "EXECUTION_FAILED"}, {14, "INTERNAL_ERROR"}, {15, "NOT_SUPPORTED"}}) {
      Prepare(worker, {absl::StrCat("--fake_cublaslt=fail_at=180,fail_with=", result)});
      const size_t before = Count(worker, "device_lost");
      ExpectUndisturbed(absl::StrCat(worker, " ", name), 0, [&] { return Replace(worker, kDeviceLost); });
      EXPECT_EQ(Count(worker, "device_lost"), before + 1);
      EXPECT_THAT(cluster_->Log(worker), ContainsRegex("device_lost .*cuBLASLt: cuda/emulated/lt: cublasLtMatmul of "
                                                       "[0-9]+ outputs of [0-9]+ inputs .*: CUBLAS_STATUS_" +
                                                       name));
    }
    Prepare(worker, {"--fake_cublaslt=no_memory_at=180"});
    const pid_t before = cluster_->pid(worker);
    ExpectUndisturbed(absl::StrCat(worker, " without memory"), 0, [] { return absl::OkStatus(); });
    EXPECT_EQ(cluster_->pid(worker), before);
    EXPECT_THAT(cluster_->Log(worker), ContainsRegex("epoch_ended .*cublasLtMatmul of .*: CUBLAS_STATUS_ALLOC_FAILED"));
  }
}

// What the library launches faults as kernels do, and then its calls fail: the device's word is what is told.
TEST_F(DisturbedLibraryTest, AKernelOfTheLibraryThatFaultsEndsTheWorker) {
  for (const char* worker : kWorkers) {
    for (const char* fault : {"--fail_launch=480", "--fail_launch=481", "--fail_launch=482", "--hang_launch=480"}) {
      Prepare(worker, {fault});
      const size_t before = Count(worker, "device_lost");
      ExpectUndisturbed(absl::StrCat(worker, " ", fault), 0, [&] { return Replace(worker, kDeviceLost); });
      EXPECT_EQ(Count(worker, "device_lost"), before + 1);
    }
    EXPECT_THAT(cluster_->Log(worker), ContainsRegex("device_lost .*cudaErrorIllegalAddress"));
    EXPECT_THAT(cluster_->Log(worker), ContainsRegex("device_lost .*the GPU hangs"));
  }
}

// A worker that comes back and finds no library to compute with refuses, with the call and what it said; the turn waits
// for one that does.
TEST_F(DisturbedLibraryTest, AWorkerWithoutAlgorithmsRefusesAndTheNextOneGoesOn) {
  const std::pair<std::string, std::string> faults[] = {
      {"no_driver=true", "cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED"},
      {"no_algorithm=true", "cublasLtMatmulAlgoGetHeuristic for [0-9]+ outputs of .*: CUBLAS_STATUS_NOT_SUPPORTED"},
      {"checks_fail=true", "none of 4 candidates will do for .*cublasLtMatmulAlgoCheck: CUBLAS_STATUS_NOT_SUPPORTED"},
      {"fail_at=0", "cublasLtMatmul of [0-9]+ outputs of .*: CUBLAS_STATUS_EXECUTION_FAILED"}};
  for (const char* worker : kWorkers) {
    ExpectUndisturbed(worker, 10, [&]() -> absl::Status {
      for (const auto& [fault, words] : faults) {
        const absl::Status refused = KillAndRestart(worker, {absl::StrCat("--fake_cublaslt=", fault)});
        EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("ended with status 1 while starting")));
        EXPECT_THAT(std::string(refused.message()), ContainsRegex(words)) << fault;
      }
      return cluster_->Restart(worker);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Versions, DisturbedTest, ::testing::Values(ModelVersion::k7, ModelVersion::k7b),
                         [](const ::testing::TestParamInfo<ModelVersion>& info) {
                           return absl::StrCat("Rwkv", checkpoint::Name(info.param));
                         });

}  // namespace
}  // namespace rwkv
