#include "services/state_store/records/record_pool.h"

#include <cstdint>
#include <cstring>
#include <memory>

#include "gtest/gtest.h"
#include "services/state_store/records/record_memory.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kBuffer = 1 << 20;

bool IsAligned(const std::shared_ptr<char>& memory) {
  return reinterpret_cast<uintptr_t>(memory.get()) % kRecordAlignment == 0;
}

TEST(RecordPoolTest, WhatWasGivenBackLastIsTakenNext) {
  const std::shared_ptr<RecordPool> pool = RecordPool::Create(2, kBuffer);
  std::shared_ptr<char> first = pool->Take(1), second = pool->Take(kBuffer);
  EXPECT_TRUE(IsAligned(first) && IsAligned(second));
  ASSERT_NE(first, second);
  std::memset(first.get(), 1, kBuffer);
  std::memset(second.get(), 2, kBuffer);
  EXPECT_EQ(first.get()[kBuffer - 1], 1);
  const char* const was = first.get();
  second.reset();
  first.reset();
  EXPECT_EQ(pool->Take(5).get(), was);
}

TEST(RecordPoolTest, KeepsNoMoreThanItMay) {
  const std::shared_ptr<RecordPool> pool = RecordPool::Create(1, kBuffer);
  std::shared_ptr<char> first = pool->Take(1), second = pool->Take(1);
  const char* const kept = first.get();
  first.reset();
  second.reset();  // Goes.
  first = pool->Take(1);
  EXPECT_EQ(first.get(), kept);
}

TEST(RecordPoolTest, WhatIsLargerThanABufferIsMadeForIt) {
  const std::shared_ptr<RecordPool> pool = RecordPool::Create(1, kBuffer);
  const std::shared_ptr<char> large = pool->Take(kBuffer + 1);
  EXPECT_TRUE(IsAligned(large));
  std::memset(large.get(), 1, kBuffer + 1);
}

TEST(RecordPoolTest, MemoryMayOutliveThePoolsOwner) {
  std::shared_ptr<RecordPool> pool = RecordPool::Create(1, kBuffer);
  const std::shared_ptr<char> memory = pool->Take(kBuffer);
  pool.reset();
  std::memset(memory.get(), 1, kBuffer);
}

}  // namespace
}  // namespace rwkv::state_store
