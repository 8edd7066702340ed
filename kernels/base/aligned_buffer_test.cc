#include "kernels/base/aligned_buffer.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

TEST(AlignedBufferTest, IsZeroedAndAligned) {
  for (int64_t size : {1, 15, 16, 17, 1000}) {
    ASSERT_OK_AND_ASSIGN(AlignedBuffer<float> buffer, AlignedBuffer<float>::Create(size));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % kBufferAlignment, 0u);
    EXPECT_EQ(buffer.size(), size);
    EXPECT_EQ(buffer.size_in_bytes(), size * 4);
    EXPECT_EQ(std::count(buffer.begin(), buffer.end(), 0.0f), size);
  }
}

TEST(AlignedBufferTest, EmptyHasNoMemory) {
  ASSERT_OK_AND_ASSIGN(AlignedBuffer<float> buffer, AlignedBuffer<float>::Create(0));
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(buffer.begin(), buffer.end());
}

TEST(AlignedBufferTest, MovedFromIsEmpty) {
  ASSERT_OK_AND_ASSIGN(AlignedBuffer<int32_t> from, AlignedBuffer<int32_t>::Create(3));
  from[2] = 7;
  AlignedBuffer<int32_t> to = std::move(from);
  EXPECT_EQ(to[2], 7);
  EXPECT_EQ(from.size(), 0);  // NOLINT: what is left is documented.
  EXPECT_EQ(from.data(), nullptr);
}

TEST(AlignedBufferTest, ImpossibleSizesAreErrors) {
  EXPECT_THAT(AlignedBuffer<float>::Create(-1), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
  EXPECT_THAT(AlignedBuffer<float>::Create(std::numeric_limits<int64_t>::max()),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("9223372036854775807")));
}

}  // namespace
}  // namespace rwkv::kernels
