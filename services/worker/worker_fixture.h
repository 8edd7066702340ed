// Whole workers of a small random model, and a driver over real gRPC.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/channel.h"
#include "services/worker/client/worker_client.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/worker.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {

class WorkerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/worker-test.safetensors");
    ASSERT_THAT(rwkv::testing::WriteRandomModel(ModelOptions(), path_), rwkv::testing::IsOk());
  }

  static rwkv::testing::RandomModelOptions ModelOptions() {
    rwkv::testing::RandomModelOptions options;
    options.layers = 5;
    options.width = 32;
    options.head_size = 16;
    options.vocab_size = 67;
    return options;
  }

  static Worker::Options OptionsOf(int stage, int stages) {
    Worker::Options options;
    options.name = absl::StrCat("worker-", stage);
    options.model = path_;
    options.stage = absl::StrCat(stage, "/", stages);
    options.slots = 40;
    options.max_batch_tokens = 64;
    return options;
  }

  void Start(int stages) {
    for (int stage = 0; stage < stages; ++stage) {
      absl::StatusOr<std::unique_ptr<Worker>> worker = Worker::Start(OptionsOf(stage, stages));
      ASSERT_THAT(worker, rwkv::testing::IsOk());
      workers_.push_back(*std::move(worker));
    }
  }

  static std::shared_ptr<WorkerClient> Connect(const Worker& worker) {
    return MakeWorkerClient(worker.address(), common::MakeChannel(worker.address()));
  }

  PipelineDriver MakeDriver() const {
    std::vector<std::shared_ptr<WorkerClient>> clients;
    for (const auto& worker : workers_) clients.push_back(Connect(*worker));
    return PipelineDriver(std::move(clients));
  }

  inline static std::string path_;
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::vector<uint32_t> tokens_ = {1, 5, 66, 0, 7, 7, 31, 2, 40, 12, 3};
};

}  // namespace rwkv::worker
