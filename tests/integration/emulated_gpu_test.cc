// Whole clusters whose workers compute on emulated GPUs say what CPUs say, with the same bits from any number of stages
// and in company.
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/client/router_client.h"
#include "tests/integration/gpu_clusters.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::LocalCluster;
using ::testing::ContainsRegex;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::SizeIs;

LocalCluster::Options Cpus(int stages) {
  LocalCluster::Options options;
  options.model = GpuModelPath();
  options.stages = stages;
  return options;
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

// The whole path with products by cuBLASLt's fake: of one client alone, who decides how many rows a step has.
TEST(EmulatedGpuTest, AnyNumberOfStagesSaysTheSameWithALibrarysProducts) {
  const Tokens prompt = Prompt(21);
  Tokens expected;
  std::string first_rows;
  for (const int stages : {1, 2}) {
    LocalCluster::Options options = Gpus(stages);
    options.worker_flags[0] = "--device=cuda/emulated/lt";
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::Start(options));
    EXPECT_THAT(cluster->Log("worker-0"), HasSubstr("/lt-130100-"));
    // What a stage's own matrices are multiplied with: at every number of rows that its steps may be padded to.
    EXPECT_THAT(cluster->Log("worker-0"),
                ContainsRegex("products_chosen device=cuda/emulated/lt choice=\"?32 outputs "
                              "of 32 inputs .*: 4 rows: algorithm [0-9]+, tile .*; 4096 rows: "));
    ASSERT_OK_AND_ASSIGN(const Tokens tokens, Generate(*cluster, prompt, 64));
    ASSERT_OK_AND_ASSIGN(const std::string rows, Logits(*cluster, prompt));
    if (stages == 1) expected = tokens, first_rows = rows;
    EXPECT_THAT(tokens, ElementsAreArray(expected));
    EXPECT_TRUE(rows == first_rows) << "the logits differ in some bit";
  }
  EXPECT_THAT(expected, SizeIs(64));
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

}  // namespace
}  // namespace rwkv
