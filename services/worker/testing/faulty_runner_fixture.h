// Runners on a device that faults, hangs or has no memory when a test says so.
#pragma once

#include <memory>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/device.h"
#include "services/worker/testing/faulty_device.h"
#include "services/worker/testing/runner_fixture.h"

namespace rwkv::worker {

class FaultyRunnerFixture : public RunnerFixture {
 protected:
  FaultyRunnerFixture() {
    engine_options_.wrap = [this](std::unique_ptr<kernels::Device> device) -> std::unique_ptr<kernels::Device> {
      return std::make_unique<FaultyDevice>(std::move(device), &faults_);
    };
  }
  ~FaultyRunnerFixture() override {
    faults_.GoOn();
    store_->Open();
    stages_.clear();
  }

  bool IsIdleSoon(int stage = 0) { return stages_[stage].runner->WaitUntilIdle(absl::Now() + absl::Seconds(60)); }

  DeviceFaults faults_;
};

}  // namespace rwkv::worker
