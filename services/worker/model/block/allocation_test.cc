// A step allocates nothing: not in the model, not in an operation, not on a stream. Once it has seen a step as large.
#include <malloc.h>

#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/api/sequence_span.h"
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
// Instead of the C library's, which operator new calls, too.
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* memory, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) {
  ++allocations;
  return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  ++allocations;
  return __libc_calloc(count, bytes);
}
void* realloc(void* memory, size_t bytes) {
  ++allocations;
  return __libc_realloc(memory, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  ++allocations;
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  *memory = memalign(alignment, bytes);
  return *memory == nullptr ? ENOMEM : 0;
}
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
  ASSERT_OK(stage->Step(TestStage::Spans({20, 1, 1})));  // As large as any below.
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
  EXPECT_EQ(allocations, 2);
  EXPECT_EQ(number->size(), 10u);
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
