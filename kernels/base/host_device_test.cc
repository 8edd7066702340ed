#include "kernels/base/host_device.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class PlainDevice final : public HostDevice {
 public:
  absl::string_view name() const override { return "plain"; }
  absl::string_view numeric_family() const override { return "plain"; }
  const OpTable& ops() const override { std::abort(); }
};

TEST(HostDeviceTest, BuffersAreZeroedAndAligned) {
  PlainDevice device;
  for (int64_t bytes : {1, 15, 63, 64, 65, 100'000}) {
    ASSERT_OK_AND_ASSIGN(Buffer buffer, device.Allocate(bytes, MemoryKind::kDevice));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % kBufferAlignment, 0u);
    EXPECT_EQ(buffer.size_in_bytes(), bytes);
    EXPECT_EQ(std::count(buffer.as<char>(), buffer.as<char>() + bytes, 0), bytes);
  }
}

TEST(HostDeviceTest, MemoryThatWasUsedBeforeIsZeroedToo) {
  PlainDevice device;
  for (int round = 0; round < 8; ++round) {
    ASSERT_OK_AND_ASSIGN(Buffer buffer, device.Allocate(4096, MemoryKind::kDevice));
    EXPECT_EQ(std::count(buffer.as<char>(), buffer.as<char>() + 4096, 0), 4096) << round;
    std::memset(buffer.data(), 0x5a, 4096);
  }
}

int64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0;
  int64_t resident = 0;
  statm >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// However used the memory is that the C library could give.
TEST(HostDeviceTest, PagesCostNothingBeforeTheyAreWritten) {
  constexpr int64_t kBytes = 32 << 20;
  PlainDevice device;
  for (int round = 0; round < 2; ++round) {
    const int64_t before = ResidentBytes();
    ASSERT_OK_AND_ASSIGN(const Buffer buffer, device.Allocate(kBytes, MemoryKind::kDevice));
    EXPECT_LT(ResidentBytes() - before, kBytes / 8);
    std::memset(buffer.data(), 1, kBytes);
    EXPECT_GT(ResidentBytes() - before, kBytes / 2);
  }
}

TEST(HostDeviceTest, NoBytesAreNoMemory) {
  PlainDevice device;
  ASSERT_OK_AND_ASSIGN(Buffer buffer, device.Allocate(0, MemoryKind::kPinned));
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(buffer.size_in_bytes(), 0);
}

TEST(HostDeviceTest, ImpossibleSizesAreErrors) {
  PlainDevice device;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  EXPECT_THAT(device.Allocate(-1, MemoryKind::kDevice), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
  EXPECT_THAT(device.Allocate(kMost, MemoryKind::kDevice),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("9223372036854775807")));
  EXPECT_THAT(DeviceArray<float>::Create(device, kMost),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("9223372036854775807 elements")));
}

TEST(HostDeviceTest, ArrayMovedFromIsEmpty) {
  PlainDevice device;
  ASSERT_OK_AND_ASSIGN(DeviceArray<int32_t> from, DeviceArray<int32_t>::Create(device, 3));
  from.data()[2] = 7;
  EXPECT_EQ(from.size_in_bytes(), 12);
  DeviceArray<int32_t> to = std::move(from);
  EXPECT_EQ(to.data()[2], 7);
  EXPECT_TRUE(from.empty());  // NOLINT: what is left is documented.
  EXPECT_EQ(from.data(), nullptr);
}

TEST(HostDeviceTest, StreamCopiesAndZeroes) {
  PlainDevice device;
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Stream> stream, device.NewStream());
  const std::vector<int32_t> from = {1, 2, 3};
  std::vector<int32_t> to = {7, 7, 7};
  ASSERT_OK(stream->Copy(to.data(), from.data(), 8));
  EXPECT_EQ(to, (std::vector<int32_t>{1, 2, 7}));
  ASSERT_OK(stream->Zero(to.data() + 1, 8));
  EXPECT_EQ(to, (std::vector<int32_t>{1, 0, 0}));
  ASSERT_OK(stream->Copy(nullptr, nullptr, 0));
}

TEST(HostDeviceTest, ScratchGrowsAndIsKept) {
  HostStream stream;
  ASSERT_OK_AND_ASSIGN(void* large, stream.Scratch(1000));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large) % kBufferAlignment, 0u);
  std::memset(large, 1, 1000);
  ASSERT_OK_AND_ASSIGN(void* small, stream.Scratch(10));
  EXPECT_EQ(small, large);
  ASSERT_OK_AND_ASSIGN(void* larger, stream.Scratch(100'000));
  std::memset(larger, 1, 100'000);
  EXPECT_OK(stream.Synchronize());
}

// What a sequence needs that grows by a token a step.
TEST(HostDeviceTest, ScratchThatGrowsSlowlyIsSeldomMadeAnew) {
  HostStream stream;
  std::set<void*> places;
  for (int64_t bytes = 1000; bytes < 4000; ++bytes) {
    ASSERT_OK_AND_ASSIGN(void* scratch, stream.Scratch(bytes));
    std::memset(scratch, 1, bytes);
    places.insert(scratch);
  }
  EXPECT_LE(places.size(), 3u);
}

TEST(HostDeviceTest, EventsAreDoneAtOnce) {
  PlainDevice device;
  HostStream stream;
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Event> event, device.NewEvent());
  EXPECT_OK(stream.Record(*event));
  EXPECT_TRUE(event->Done());
  EXPECT_OK(event->WaitOnHost());
}

TEST(HostDeviceTest, LoadKeepsTheMatrixWhereItIsAndChecksIt) {
  PlainDevice device;
  const std::vector<float> values(6);
  const MatrixView matrix = {DType::kFloat32, 2, 3, values.data()};
  ASSERT_OK_AND_ASSIGN(const Weight weight, device.Load(matrix, WeightUse::kProduct));
  EXPECT_EQ(weight.matrix.data, values.data());
  EXPECT_EQ(weight.packed.data(), nullptr);
  EXPECT_THAT(device.Load({DType::kFloat32, 2, 0, values.data()}, WeightUse::kRows),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[2, 0]")));
}

}  // namespace
}  // namespace rwkv::kernels
