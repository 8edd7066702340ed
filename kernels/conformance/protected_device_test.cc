#include "kernels/conformance/protected_device.h"

#include <cmath>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/dispatch/open_device.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

class ProtectedDeviceTest : public ::testing::Test {
 protected:
  ProtectedDeviceTest() : device_(ProtectDevice(*OpenDevice("cpu"))) {}

  const std::unique_ptr<Device> device_;
};

using ProtectedDeviceDeathTest = ProtectedDeviceTest;

TEST_F(ProtectedDeviceDeathTest, HostCannotTouchDeviceMemory) {
  ASSERT_OK_AND_ASSIGN(const Buffer buffer, device_->Allocate(64, MemoryKind::kDevice));
  EXPECT_DEATH(*buffer.as<volatile float>() = 1.0f, "");
  EXPECT_DEATH(std::exit(*buffer.as<volatile float>() == 1.0f ? 0 : 1), "");
}

TEST_F(ProtectedDeviceDeathTest, WhatReachesBeyondABufferFaults) {
  ASSERT_OK_AND_ASSIGN(const Buffer buffer, device_->Allocate(64, MemoryKind::kDevice));
  ASSERT_OK_AND_ASSIGN(const Buffer next, device_->Allocate(64, MemoryKind::kDevice));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, device_->NewStream());
  EXPECT_OK(stream->Zero(buffer.data(), 64));
  EXPECT_DEATH((void)stream->Zero(buffer.data(), 68), "");
  EXPECT_DEATH((void)stream->Zero(next.as<char>() - 4096, 4), "");
}

TEST_F(ProtectedDeviceDeathTest, MemoryThatWasGivenBackFaults) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, device_->NewStream());
  void* gone = nullptr;
  {
    ASSERT_OK_AND_ASSIGN(const Buffer buffer, device_->Allocate(64, MemoryKind::kDevice));
    gone = buffer.data();
  }
  EXPECT_DEATH((void)stream->Zero(gone, 4), "");
}

TEST_F(ProtectedDeviceTest, PinnedMemoryIsTheHosts) {
  ASSERT_OK_AND_ASSIGN(const Buffer buffer, device_->Allocate(64, MemoryKind::kPinned));
  *buffer.as<float>() = 1.0f;
  EXPECT_EQ(*buffer.as<float>(), 1.0f);
}

TEST_F(ProtectedDeviceTest, CopiesGoThroughAndFreshMemoryIsNoNumber) {
  DeviceMemory memory(*device_);
  EXPECT_EQ(memory.Get(memory.Put({1.0f, 2.0f}), 2), (std::vector<float>{1.0f, 2.0f}));
  ASSERT_OK_AND_ASSIGN(const Buffer fresh, device_->Allocate(8, MemoryKind::kDevice));
  EXPECT_TRUE(std::isnan(memory.Get(fresh.as<float>(), 2)[1]));
  ASSERT_OK(memory.stream().Zero(fresh.data(), 8));
  EXPECT_EQ(memory.Get(fresh.as<float>(), 2), (std::vector<float>{0.0f, 0.0f}));
}

}  // namespace
}  // namespace rwkv::kernels::conformance
