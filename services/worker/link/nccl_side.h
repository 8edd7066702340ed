// One end of a pair over the fake NCCL, for tests.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/link.h"
#include "services/worker/link/nccl.h"
#include "services/worker/link/nccl_link.h"
#include "services/worker/link/testing/fake_nccl.h"

namespace rwkv::worker {

inline constexpr LinkShape kShape = {3, 2, 8};

// Of one end: memory and a stream on the emulated device, and its NCCL.
struct Side {
  explicit Side(const std::string& identity, const LinkShape& shape = kShape,
                const nccl::Nccl& library = nccl::kFakeNccl, absl::Duration call = absl::Seconds(20))
      : shape(shape) {
    NcclLimits limits;
    limits.init = absl::Seconds(20);
    limits.call = call;
    limits.abort = absl::Milliseconds(300);
    links = *MakeNcclLinks(
        library, identity, [this] { return device->MakeCurrent(); }, limits);
    x = *kernels::DeviceArray<float>::Create(*device, shape.max_rows * shape.width);
    v_first = *kernels::DeviceArray<float>::Create(*device, shape.max_rows * shape.v_first_width);
    done = *device->NewEvent();
  }

  void Fill(uint64_t step) {
    for (int64_t i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(step * 100 + i) + 0.1f;
    for (int64_t i = 0; i < v_first.size(); ++i) v_first.data()[i] = -static_cast<float>(step + i) / 3;
  }
  absl::Status Move(DeviceRows& rows, int64_t count) {
    absl::Status status = rows.Move(count, x.data(), v_first.data(), *stream);
    return status.ok() ? stream->Record(*done) : status;
  }
  bool DoneSoon(const std::function<bool()>& or_else = [] { return false; }) {
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (!done->Done()) {
      if (or_else() || absl::Now() > limit) return false;
      std::this_thread::yield();
    }
    return true;
  }

  const LinkShape shape;
  std::unique_ptr<kernels::Device> device = *kernels::cuda::OpenEmulatedDevice();
  std::unique_ptr<kernels::Stream> stream = *device->NewStream();
  std::unique_ptr<kernels::Event> done;
  kernels::DeviceArray<float> x, v_first;
  std::unique_ptr<DeviceLinks> links;
  absl::Notification stop;
};

// Of tests of pairs: nothing is left, nothing was done that must not be.
class NcclLinkTest : public ::testing::Test {
 protected:
  NcclLinkTest() {
    kernels::cuda::ResetFake();
    nccl::ResetFake();
  }
  ~NcclLinkTest() override {
    EXPECT_EQ(nccl::CommunicatorsOfFake(), 0) << "a communicator is left";
    EXPECT_THAT(nccl::ViolationsOfFake(), ::testing::IsEmpty());
    EXPECT_THAT(kernels::cuda::ViolationsOfFake(), ::testing::IsEmpty());
    nccl::ResetFake();
  }
};

}  // namespace rwkv::worker
