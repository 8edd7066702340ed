// The runners of all stages of a small model, with links in process and a store in memory, for tests.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/metrics.h"
#include "services/worker/client/worker_client.h"
#include "services/worker/engine/router_registry.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/stage_runner.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/inproc_link.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/memory_records.h"
#include "services/worker/testing/runner_client.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {

// On the device that the parameter names.
class RunnerFixture : public ::testing::TestWithParam<const char*> {
 protected:
  struct Stage {
    std::unique_ptr<common::Metrics> metrics;
    std::unique_ptr<WorkerMetrics> worker_metrics;
    std::unique_ptr<StageEngine> engine;
    std::unique_ptr<LinkTransport> links;
    std::unique_ptr<SnapshotTransfer> transfer;
    std::unique_ptr<StageRunner> runner;
  };

  static void SetUpTestSuite() {
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/runner.safetensors");
    rwkv::testing::RandomModelOptions options;
    options.layers = 5;
    options.width = 32;
    options.head_size = 16;
    options.vocab_size = 67;
    ASSERT_THAT(rwkv::testing::WriteRandomModel(options, path_), rwkv::testing::IsOk());
  }

  ~RunnerFixture() override {
    store_->Open();  // Nobody waits for a record any more.
    // In-process links end when either side does, so the order is free.
    stages_.clear();
  }

  // Stage i listens at "stage-<i>", and clients_[i] drives it.
  void Start(int stages, SnapshotTransfer::Options transfer = {}) {
    for (int i = 0; i < stages; ++i) {
      Stage stage;
      absl::StatusOr<std::unique_ptr<common::Metrics>> metrics = common::Metrics::Create("");
      ASSERT_THAT(metrics, rwkv::testing::IsOk());
      stage.metrics = *std::move(metrics);
      stage.worker_metrics = std::make_unique<WorkerMetrics>(*stage.metrics);
      engine_options_.device = GetParam();
      absl::StatusOr<std::unique_ptr<StageEngine>> engine = MakeTestEngine(path_, i, stages, engine_options_);
      ASSERT_THAT(engine, rwkv::testing::IsOk());
      stage.engine = *std::move(engine);
      const std::string address = absl::StrCat("stage-", i);
      stage.links = network_.Join(address, stage.engine->link_shape());
      if (wrap_links_) stage.links = wrap_links_(std::move(stage.links));
      stage.transfer = std::make_unique<SnapshotTransfer>(transfer, stage.worker_metrics.get());
      stage.runner = std::make_unique<StageRunner>(
          stage.engine.get(), stage.links.get(), stage.transfer.get(), [store = store_] { return store; },
          stage.worker_metrics.get(), &routers_, options_);
      clients_.push_back(MakeRunnerClient(address, stage.runner.get()));
      stages_.push_back(std::move(stage));
    }
  }

  bool protects_memory() const { return GetParam() == std::string(kProtectedDevice); }

  static v1::AttachSequence FromSnapshot(int slot, uint64_t sequence, const v1::SnapshotManifest& manifest) {
    v1::AttachSequence attach;
    attach.set_slot(slot);
    attach.set_sequence(sequence);
    attach.set_position(manifest.position());
    *attach.mutable_snapshot() = manifest;
    return attach;
  }

  static v1::ExecuteRequest SaveOf(int slot, uint64_t sequence, uint64_t position, const std::string& id) {
    v1::ExecuteRequest request;
    request.mutable_save()->set_slot(slot);
    request.mutable_save()->set_sequence(sequence);
    request.mutable_save()->set_expected_position(position);
    request.mutable_save()->set_snapshot_id(id);
    return request;
  }

  static inline std::string path_;
  TestEngineOptions engine_options_;  // Of engines and runners that Start() makes.
  StageRunnerOptions options_;
  // What each stage's links are put into; null: nothing.
  std::function<std::unique_ptr<LinkTransport>(std::unique_ptr<LinkTransport>)> wrap_links_;
  rwkv::testing::FakeClock clock_;
  RouterRegistry routers_{&clock_};
  InprocLinkNetwork network_;
  const std::shared_ptr<MemoryRecords> store_ = std::make_shared<MemoryRecords>();
  std::vector<Stage> stages_;
  std::vector<std::shared_ptr<WorkerClient>> clients_;
  const std::vector<uint32_t> tokens_ = {1, 5, 66, 0, 7, 7, 31, 2, 40, 12, 3};
};

}  // namespace rwkv::worker
