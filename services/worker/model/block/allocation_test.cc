// A step allocates nothing: not in the model, not in an operation, not on a stream. Once it has seen a step as large.
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/block/test_stage.h"
#include "tests/testing/status_matchers.h"

#if !defined(__has_feature)
#define __has_feature(x) 0
#endif
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define RWKV_COUNTS_ALLOCATIONS 0  // They have an allocator of their own.
#else
#define RWKV_COUNTS_ALLOCATIONS 1
#endif

namespace {
std::atomic<int64_t> allocations{0};
}  // namespace

#if RWKV_COUNTS_ALLOCATIONS
// In place of the C library's, which operator new calls, too: by the label, the linker takes these for them.
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* memory, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
}
void* CountedMalloc(size_t bytes) __asm__("malloc");
void* CountedCalloc(size_t count, size_t bytes) __asm__("calloc");
void* CountedRealloc(void* memory, size_t bytes) __asm__("realloc");
void* CountedMemalign(size_t alignment, size_t bytes) __asm__("memalign");
void* CountedAlignedAlloc(size_t alignment, size_t bytes) __asm__("aligned_alloc");
int CountedPosixMemalign(void** memory, size_t alignment, size_t bytes) __asm__("posix_memalign");
void* CountedMmap(void* at, size_t bytes, int access, int flags, int file, off_t offset) __asm__("mmap");

void* CountedMalloc(size_t bytes) {
  ++allocations;
  return __libc_malloc(bytes);
}
void* CountedCalloc(size_t count, size_t bytes) {
  ++allocations;
  return __libc_calloc(count, bytes);
}
void* CountedRealloc(void* memory, size_t bytes) {
  ++allocations;
  return __libc_realloc(memory, bytes);
}
void* CountedMemalign(size_t alignment, size_t bytes) {
  ++allocations;
  return __libc_memalign(alignment, bytes);
}
void* CountedAlignedAlloc(size_t alignment, size_t bytes) { return CountedMemalign(alignment, bytes); }
int CountedPosixMemalign(void** memory, size_t alignment, size_t bytes) {
  *memory = CountedMemalign(alignment, bytes);
  return *memory == nullptr ? ENOMEM : 0;
}
void* CountedMmap(void* at, size_t bytes, int access, int flags, int file, off_t offset) {
  ++allocations;
  return reinterpret_cast<void*>(syscall(SYS_mmap, at, bytes, access, flags, file, offset));
}
#endif

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;
class AllocationTest : public ::testing::TestWithParam<std::tuple<std::string, ModelVersion>> {};

TEST_P(AllocationTest, AStepAllocatesNothing) {
#if !RWKV_COUNTS_ALLOCATIONS
  GTEST_SKIP() << "the sanitizer's allocator is not counted";
#endif
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<kernels::Device> device, kernels::OpenDevice(std::get<0>(GetParam())));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TestStage> stage,
                       TestStage::Create(std::move(device), std::get<1>(GetParam())));
  // As large as any below. RWKV-7b computes with all tokens of a sequence, which tiles take by 16: from 33 to 47 here.
  ASSERT_OK(stage->Step(TestStage::Spans({20, 1, 1})));
  ASSERT_OK(stage->Step(TestStage::Spans({13, 1, 1})));
  for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{1, 1, 1}, {1}, {9, 3}, {2, 2, 2, 2}, {1, 1, 1, 1}}) {
    const std::vector<kernels::SequenceSpan> spans = TestStage::Spans(lengths);
    allocations = 0;
    const absl::Status status = stage->Step(spans);
    const int64_t of_step = allocations;
    EXPECT_OK(status);
    EXPECT_EQ(of_step, 0) << lengths.size() << " sequences";
  }
}

#if RWKV_COUNTS_ALLOCATIONS
TEST(CountingTest, AllocationsAreCounted) {
  allocations = 0;
  auto number = std::make_unique<std::vector<int>>(10);
  const int64_t of_vector = allocations;
  EXPECT_EQ(of_vector, 2);
  EXPECT_EQ(number->size(), 10u);
  const std::unique_ptr<kernels::Device> device = *kernels::OpenDevice("cpu");
  for (int64_t bytes : {1000, 1'000'000}) {
    allocations = 0;
    const absl::StatusOr<kernels::Buffer> buffer = device->Allocate(bytes, kernels::MemoryKind::kDevice);
    const int64_t counted = allocations;
    EXPECT_OK(buffer.status());
    EXPECT_EQ(counted, 1) << bytes;
  }
}
#endif

// All but the reference, which is as plain as the paper.
std::vector<std::string> Devices() {
  std::vector<std::string> devices = kernels::AvailableDevices();
  devices.erase(devices.begin());
  return devices;
}

INSTANTIATE_TEST_SUITE_P(Devices, AllocationTest,
                         ::testing::Combine(::testing::ValuesIn(Devices()),
                                            ::testing::ValuesIn(checkpoint::kModelVersions)),
                         [](const auto& info) {
                           std::string name = absl::StrCat(std::get<0>(info.param), "_rwkv",
                                                           checkpoint::Name(std::get<1>(info.param)));
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           return name;
                         });

}  // namespace
}  // namespace rwkv::worker
