#include "kernels/base/stream.h"

#include <cstdint>
#include <cstring>

#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

TEST(CpuStreamTest, WorkspaceGrowsAndIsKept) {
  CpuStream stream;
  EXPECT_EQ(stream.device(), Device::kCpu);
  ASSERT_OK_AND_ASSIGN(void* large, stream.Workspace(1000));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large) % kBufferAlignment, 0u);
  std::memset(large, 1, 1000);
  ASSERT_OK_AND_ASSIGN(void* small, stream.Workspace(10));
  EXPECT_EQ(small, large);
  ASSERT_OK_AND_ASSIGN(void* larger, stream.Workspace(100000));
  std::memset(larger, 1, 100000);
  EXPECT_OK(stream.Synchronize());
}

}  // namespace
}  // namespace rwkv::kernels
