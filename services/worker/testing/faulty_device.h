// A device that faults, hangs or has no memory when a test says so; what was recorded before is done. Over the
// reference, whose operations do not look into their stream.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::worker {

// What becomes of devices that share it. Thread-safe.
class DeviceFaults {
 public:
  // For good: every wait ends with it, and every copy.
  void FaultWith(absl::Status fault) {
    absl::MutexLock lock(&mu_);
    fault_ = std::move(fault);
  }
  // Nothing is done any more, and who waits does so until GoOn(), or GiveUp(): then waits end with kDeadlineExceeded.
  void Hang() {
    absl::MutexLock lock(&mu_);
    hangs_ = true;
  }
  void GoOn() {
    absl::MutexLock lock(&mu_);
    hangs_ = false;
  }
  void GiveUp() {
    absl::MutexLock lock(&mu_);
    gives_up_ = true;
  }
  void SetNoMemory(bool no_memory) {
    absl::MutexLock lock(&mu_);
    no_memory_ = no_memory;
  }
  // Until somebody waits for a device that hangs.
  void WaitForWaiting() {
    absl::MutexLock lock(&mu_);
    const auto reached = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return waiting_ > 0; };
    if (mu_.AwaitWithTimeout(absl::Condition(&reached), absl::Seconds(60))) return;
    ADD_FAILURE() << "nobody has waited for the device for a minute";
  }

  // For the device.
  bool hangs() {
    absl::MutexLock lock(&mu_);
    return hangs_;
  }
  bool works() {
    absl::MutexLock lock(&mu_);
    return !hangs_ && fault_.ok();
  }
  absl::Status Wait() {
    absl::MutexLock lock(&mu_);
    ++waiting_;
    const auto over = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !hangs_ || gives_up_; };
    mu_.Await(absl::Condition(&over));
    --waiting_;
    return hangs_ ? absl::DeadlineExceededError("the device hangs") : fault_;
  }
  absl::Status fault() {
    absl::MutexLock lock(&mu_);
    return fault_;
  }
  absl::Status CheckMemory() {
    absl::MutexLock lock(&mu_);
    return no_memory_ ? absl::ResourceExhaustedError("the device has no memory") : absl::OkStatus();
  }

 private:
  absl::Mutex mu_;
  absl::Status fault_ ABSL_GUARDED_BY(mu_);
  bool hangs_ ABSL_GUARDED_BY(mu_) = false;
  bool gives_up_ ABSL_GUARDED_BY(mu_) = false;
  bool no_memory_ ABSL_GUARDED_BY(mu_) = false;
  int waiting_ ABSL_GUARDED_BY(mu_) = 0;
};

class FaultyEvent final : public kernels::Event {
 public:
  explicit FaultyEvent(DeviceFaults* faults) : faults_(faults) {}
  void Record() { is_troubled_ = !faults_->works(); }
  bool Done() const override { return !is_troubled_ || !faults_->hangs(); }
  absl::Status WaitOnHost() const override { return is_troubled_ ? faults_->Wait() : absl::OkStatus(); }

 private:
  DeviceFaults* const faults_;
  std::atomic<bool> is_troubled_{false};
};

class FaultyStream final : public kernels::Stream {
 public:
  FaultyStream(std::unique_ptr<kernels::Stream> stream, DeviceFaults* faults)
      : stream_(std::move(stream)), faults_(faults) {}
  absl::Status Copy(void* to, const void* from, int64_t bytes) override {
    RWKV_RETURN_IF_ERROR(faults_->fault());
    return stream_->Copy(to, from, bytes);
  }
  absl::Status Zero(void* memory, int64_t bytes) override {
    RWKV_RETURN_IF_ERROR(faults_->fault());
    return stream_->Zero(memory, bytes);
  }
  absl::Status Record(kernels::Event& event) override {
    static_cast<FaultyEvent&>(event).Record();
    return absl::OkStatus();
  }
  absl::StatusOr<void*> Scratch(int64_t bytes) override { return stream_->Scratch(bytes); }
  absl::Status Synchronize() override { return faults_->Wait(); }

 private:
  const std::unique_ptr<kernels::Stream> stream_;
  DeviceFaults* const faults_;
};

class FaultyDevice final : public kernels::Device {
 public:
  // `faults` outlives it.
  FaultyDevice(std::unique_ptr<kernels::Device> reference, DeviceFaults* faults)
      : device_(std::move(reference)), faults_(faults) {}
  absl::string_view name() const override { return "faulty"; }
  absl::string_view numeric_family() const override { return device_->numeric_family(); }
  absl::StatusOr<kernels::Buffer> Allocate(int64_t bytes, kernels::MemoryKind kind) override {
    RWKV_RETURN_IF_ERROR(faults_->CheckMemory());
    return device_->Allocate(bytes, kind);
  }
  absl::StatusOr<std::unique_ptr<kernels::Stream>> NewStream() override {
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Stream> stream, device_->NewStream());
    return std::make_unique<FaultyStream>(std::move(stream), faults_);
  }
  absl::StatusOr<std::unique_ptr<kernels::Event>> NewEvent() override { return std::make_unique<FaultyEvent>(faults_); }
  absl::StatusOr<kernels::Weight> Load(const kernels::MatrixView& matrix, kernels::WeightUse use) override {
    return device_->Load(matrix, use);
  }
  const kernels::OpTable& ops() const override { return device_->ops(); }

 private:
  const std::unique_ptr<kernels::Device> device_;
  DeviceFaults* const faults_;
};

}  // namespace rwkv::worker
