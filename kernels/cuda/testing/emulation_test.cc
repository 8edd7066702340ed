// That the emulation computes what CUDA does, and sees each thing that CUDA forbids.
#include "kernels/cuda/testing/emulation.h"

#include <cmath>
#include <set>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/device.cuh"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::cuda {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr absl::StatusCode kForbidden = absl::StatusCode::kInternal;

template <typename... Parameters, typename... Arguments>
absl::Status RunKernel(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  Launch(nullptr, shape, "kernel", kernel, arguments...);
  return emulation::LastStatus();
}

class EmulationTest : public ::testing::TestWithParam<emulation::Order> {
 protected:
  EmulationTest() { emulation::SetOrder(GetParam(), 17); }
  ~EmulationTest() override { emulation::SetOrder(emulation::Order::kForward); }
};

struct Row {
  float values[96];
};

// The neighbour's value, and where the thread is.
RWKV_KERNEL(96) Neighbour(const float* x, float* y, int* where) {
  Row& row = BlockShared<Row>();
  const int at = (BlockIndexY() * 2 + BlockIndexX()) * BlockThreads() + ThreadIndex();
  row.values[ThreadIndex()] = x[at];
  SyncBlock();
  y[at] = row.values[(ThreadIndex() + 1) % BlockThreads()];
  where[at] = at;
}

TEST_P(EmulationTest, ThreadsOfABlockMeetAtTheBarrier) {
  std::vector<float> x(6 * 96), y(6 * 96);
  std::vector<int> where(6 * 96);
  for (int i = 0; i < 6 * 96; ++i) x[i] = static_cast<float>(i);
  EXPECT_THAT(RunKernel({2, 3, 96, sizeof(Row)}, Neighbour, x.data(), y.data(), where.data()), IsOk());
  for (int i = 0; i < 6 * 96; ++i) {
    EXPECT_EQ(y[i], static_cast<float>(i / 96 * 96 + (i + 1) % 96)) << i;
    EXPECT_EQ(where[i], i);
  }
}

RWKV_KERNEL(64) Sums(const float* x, float* all, float* fours, float* swapped) {
  const int t = ThreadIndex();
  all[t] = WarpSum(x[t]);
  fours[t] = WarpSum<4>(x[t]);
  swapped[t] = ShuffleXor(x[t], 3);
}

TEST_P(EmulationTest, LanesOfAWarpShareTheirValues) {
  std::vector<float> x(64), all(64), fours(64), swapped(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(1 << (i % 20));
  EXPECT_THAT(RunKernel({1, 1, 64, 0}, Sums, x.data(), all.data(), fours.data(), swapped.data()), IsOk());
  for (int i = 0; i < 64; ++i) {
    float sum = 0.0f;
    for (int l = 0; l < 32; ++l) sum += x[i / 32 * 32 + l];
    EXPECT_EQ(all[i], sum) << i;
    EXPECT_EQ(fours[i], x[i / 4 * 4] + x[i / 4 * 4 + 1] + x[i / 4 * 4 + 2] + x[i / 4 * 4 + 3]) << i;
    EXPECT_EQ(swapped[i], x[i ^ 3]) << i;
  }
}

// A barrier that is not there shows in the values: a thread runs as far as it can.
RWKV_KERNEL(64) Unsynchronised(float* y) {
  Row& row = BlockShared<Row>();
  row.values[ThreadIndex()] = 1.0f;
  y[ThreadIndex()] = row.values[63 - ThreadIndex()];
}

TEST_P(EmulationTest, MissingBarrierShowsAsNotANumber) {
  std::vector<float> y(64);
  EXPECT_THAT(RunKernel({1, 1, 64, sizeof(Row)}, Unsynchronised, y.data()), IsOk());
  int missing = 0;
  for (float value : y) missing += std::isnan(value) ? 1 : 0;
  EXPECT_GT(missing, 0);
}

RWKV_KERNEL(64) Divergent(int threads) {
  if (ThreadIndex() < threads) SyncBlock();
}

TEST_P(EmulationTest, BarrierThatSomeThreadsDoNotReachIsForbidden) {
  EXPECT_THAT(RunKernel({1, 1, 64, 0}, Divergent, 64), IsOk());
  EXPECT_THAT(RunKernel({1, 1, 64, 0}, Divergent, 63),
              StatusIs(kForbidden, AllOf(HasSubstr("at the barrier"), HasSubstr("1 threads have left"))));
}

RWKV_KERNEL(64) TwoBarriers() {
  if (ThreadIndex() < 32) {
    SyncBlock();
  } else {
    SyncBlock();
  }
}

TEST_P(EmulationTest, BlockSplitOverTwoBarriersIsForbidden) {
  EXPECT_THAT(RunKernel({1, 1, 64, 0}, TwoBarriers), StatusIs(kForbidden, HasSubstr("the block is split")));
}

RWKV_KERNEL(32) LaneMissing(float* y) {
  if (ThreadIndex() != 5) y[ThreadIndex()] = WarpSum(1.0f);
}

TEST_P(EmulationTest, CollectiveWithoutALaneIsForbidden) {
  std::vector<float> y(32);
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, LaneMissing, y.data()), StatusIs(kForbidden, HasSubstr("in the collective")));
}

RWKV_KERNEL(32) SplitWarp(float* y) {
  if (ThreadIndex() < 7) {
    y[ThreadIndex()] = ShuffleXor(1.0f, 1);
  } else {
    y[ThreadIndex()] = ShuffleXor(2.0f, 1);
  }
}

TEST_P(EmulationTest, WarpSplitOverTwoCollectivesIsForbidden) {
  std::vector<float> y(32);
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, SplitWarp, y.data()), StatusIs(kForbidden, HasSubstr("its warp is split")));
}

RWKV_KERNEL(32) BarrierAgainstCollective() {
  if (ThreadIndex() == 0) {
    SyncBlock();
  } else {
    SyncWarp();
  }
}

TEST_P(EmulationTest, WaitingForEachOtherIsForbidden) {
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, BarrierAgainstCollective),
              StatusIs(kForbidden, AllOf(HasSubstr("waits forever"), HasSubstr("waits at"))));
}

RWKV_KERNEL(32) TakesSharedMemory(int reach) { BlockShared<Row>().values[reach] = 1.0f; }

TEST_P(EmulationTest, SharedMemoryBeyondTheLaunchIsForbidden) {
  EXPECT_THAT(RunKernel({1, 1, 32, sizeof(Row)}, TakesSharedMemory, 95), IsOk());
  EXPECT_THAT(RunKernel({1, 1, 32, sizeof(Row) - 4}, TakesSharedMemory, 0),
              StatusIs(kForbidden, HasSubstr("gave 380")));
  EXPECT_THAT(RunKernel({1, 1, 32, sizeof(Row)}, TakesSharedMemory, 96),
              StatusIs(kForbidden, HasSubstr("wrote 0 bytes behind its 384 bytes")));
}

RWKV_KERNEL(32) ReadsShared(float* y) { y[ThreadIndex()] = BlockShared<Row>().values[ThreadIndex()]++; }

TEST_P(EmulationTest, SharedMemoryIsFreshForEveryBlock) {
  std::vector<float> y(32);
  EXPECT_THAT(RunKernel({4, 1, 32, sizeof(Row)}, ReadsShared, y.data()), IsOk());
  for (float value : y) EXPECT_TRUE(std::isnan(value));
}

RWKV_KERNEL(32) Wide(const float* x, float* y) {
  if (ThreadIndex() == 0) Store4(y, Load4(x));
}

TEST_P(EmulationTest, MisalignedWideAccessIsForbidden) {
  alignas(16) float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  alignas(16) float y[8] = {};
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, Wide, x + 4, y), IsOk());
  EXPECT_THAT(y, ElementsAre(5, 6, 7, 8, 0, 0, 0, 0));
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, Wide, x + 1, y), StatusIs(kForbidden, HasSubstr("reads 16 bytes")));
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, Wide, x, y + 2), StatusIs(kForbidden, HasSubstr("writes 16 bytes")));
}

RWKV_KERNEL(32) Nothing() {}

RWKV_KERNEL(32) Misaligned8(const char* memory, int offset) { (void)LoadStreaming8(memory + offset); }

TEST_P(EmulationTest, MisalignedAccessOf8BytesIsForbidden) {
  alignas(8) const char memory[16] = {};
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, Misaligned8, static_cast<const char*>(memory), 8), IsOk());
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, Misaligned8, static_cast<const char*>(memory), 4),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("reads 8 bytes at an address that is not aligned")));
}

RWKV_KERNEL(32) TakeField(int index, uint32_t* out) { out[ThreadIndex()] = Field<8>(0x80706050u, index); }

TEST_P(EmulationTest, FieldOutsideItsWordIsForbidden) {
  uint32_t out[32] = {};
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, TakeField, 3, static_cast<uint32_t*>(out)), IsOk());
  EXPECT_EQ(out[31], 0x80u);
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, TakeField, 4, static_cast<uint32_t*>(out)),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("shifts a word by 32 bits")));
}

// [16, 32] and [8, 32] signed bytes, and [16, 8] sums, as PTX' figures of m16n8k32 have them.
RWKV_KERNEL(32) MultiplyBytes(const int8_t* a, const int8_t* b, int32_t* sums) {
  const int g = ThreadIndex() / 4;
  const int t = ThreadIndex() % 4;
  uint32_t parts[4] = {};
  uint32_t column[2] = {};
  for (int byte = 0; byte < 4; ++byte) {
    for (int i = 0; i < 4; ++i) {
      const int8_t value = a[(g + i % 2 * 8) * 32 + 4 * t + i / 2 * 16 + byte];
      parts[i] |= static_cast<uint32_t>(static_cast<uint8_t>(value)) << (8 * byte);
    }
    for (int i = 0; i < 2; ++i) {
      column[i] |= static_cast<uint32_t>(static_cast<uint8_t>(b[g * 32 + 4 * t + i * 16 + byte])) << (8 * byte);
    }
  }
  int32_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  MmaInt8(c, parts, column);
  for (int i = 0; i < 4; ++i) sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

TEST_P(EmulationTest, ProductOfBytesIsAddedToTheSums) {
  int8_t a[16 * 32];
  int8_t b[8 * 32];
  int32_t sums[16 * 8];
  for (int i = 0; i < 16 * 32; ++i) a[i] = static_cast<int8_t>(37 * i + i / 11);
  for (int i = 0; i < 8 * 32; ++i) b[i] = static_cast<int8_t>(91 * i + i / 7);
  for (int i = 0; i < 16 * 8; ++i) sums[i] = 1000 * i;
  EXPECT_THAT(RunKernel({1, 1, 32, 0}, MultiplyBytes, static_cast<const int8_t*>(a), static_cast<const int8_t*>(b),
                        static_cast<int32_t*>(sums)),
              IsOk());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int32_t expected = 1000 * (row * 8 + column);
      for (int k = 0; k < 32; ++k) expected += a[row * 32 + k] * b[column * 32 + k];
      EXPECT_EQ(sums[row * 8 + column], expected) << row << ", " << column;
    }
  }
}

TEST_P(EmulationTest, LaunchBeyondTheLimitsIsRefused) {
  EXPECT_THAT(RunKernel({1, 65535, 32, 48 * 1024}, Nothing), IsOk());
  const LaunchShape shapes[] = {{0, 1, 32, 0}, {1, 0, 32, 0}, {1, 65536, 32, 0}, {1, 1, 1056, 0},
                                {1, 1, 0, 0},  {1, 1, 33, 0}, {1, 1, 32, 49153}, {2147483648u, 1, 32, 0}};
  for (const LaunchShape& shape : shapes) {
    EXPECT_THAT(RunKernel(shape, Nothing), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("launch of")));
  }
}

// Where launches overlap, the kernel before may still run until BeginKernel().
RWKV_KERNEL(32) ReadsTooEarly(const float* from, float* to) {
  const Float4 v = Load4(from);
  BeginKernel();
  Store4(to, v);
}
RWKV_KERNEL(32) NeverBegins(float* to) { to[ThreadIndex()] = 1.0f; }
RWKV_KERNEL(32) SomeLeave(float* to) {
  if (ThreadIndex() == 7) return;
  BeginKernel();
  to[ThreadIndex()] = 1.0f;
}
RWKV_KERNEL(32) Begins(const float* weights, float* to) {
  Prefetch(weights);
  BlockShared<Float4>() = {1.0f, 2.0f, 3.0f, 4.0f};
  const float y = Load4(reinterpret_cast<const float*>(&BlockShared<Float4>())).y;
  BeginKernel();
  to[ThreadIndex()] = y;
}

TEST_P(EmulationTest, OverlappingKernelThatTouchesMemoryTooEarlyIsFound) {
  alignas(16) float from[4] = {};
  alignas(16) float to[32] = {};
  const auto launch = [](bool overlaps, auto kernel, auto... arguments) {
    (void)Launch({nullptr, overlaps}, {1, 1, 32, sizeof(Float4)}, "kernel", kernel, arguments...);
    return emulation::LastStatus();
  };
  const float* const in = from;
  EXPECT_THAT(launch(true, ReadsTooEarly, in, to),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("reads 16 bytes before BeginKernel()")));
  EXPECT_THAT(launch(true, NeverBegins, to),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("leaves without BeginKernel()")));
  EXPECT_THAT(launch(true, SomeLeave, to),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("thread 7: leaves without BeginKernel()")));
  EXPECT_THAT(launch(true, Begins, in, to), IsOk());
  EXPECT_EQ(to[31], 2.0f);
  EXPECT_THAT(launch(false, ReadsTooEarly, in, to), IsOk());
  EXPECT_THAT(launch(false, NeverBegins, to), IsOk());
}

struct Counters {
  uint64_t values[2];
};
RWKV_KERNEL(64) Counts(uint64_t* to) {
  Counters& shared = BlockShared<Counters>();
  if (ThreadIndex() < 2) shared.values[ThreadIndex()] = 0;
  SyncBlock();
  AtomicAdd(&shared.values[ThreadIndex() % 2], uint64_t{1} << 40 | 1u);
  SyncBlock();
  if (ThreadIndex() < 2) to[ThreadIndex()] = shared.values[ThreadIndex()];
}
RWKV_KERNEL(32) AddsAskew(uint64_t*) {
  AtomicAdd(reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(&BlockShared<Counters>()) + 4), 1);
}

TEST_P(EmulationTest, AtomicsAddUp) {
  uint64_t to[2] = {};
  EXPECT_THAT(RunKernel({1, 1, 64, sizeof(Counters)}, Counts, static_cast<uint64_t*>(to)), IsOk());
  EXPECT_EQ(to[0], uint64_t{32} << 40 | 32u);
  EXPECT_EQ(to[1], to[0]);
  EXPECT_THAT(RunKernel({1, 1, 32, sizeof(Counters)}, AddsAskew, static_cast<uint64_t*>(to)),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("not aligned")));
}

// What a launcher that runs them later finds is what they were when they were enqueued.
struct Parameter {
  float values[5];
};
RWKV_KERNEL(32) Adds(Parameter parameter, float* y) { *y = parameter.values[4]; }

TEST_P(EmulationTest, ArgumentsAreCopied) {
  static std::vector<emulation::Kernel>* const queue = new std::vector<emulation::Kernel>;
  queue->clear();
  float y = 0.0f;
  {
    Parameter parameter = {{1, 2, 3, 4, 5}};
    emulation::SetLauncher([](StreamHandle, emulation::Kernel kernel) {
      queue->push_back(std::move(kernel));
      return 0;
    });
    Launch(nullptr, {1, 1, 32, 0}, "kernel", Adds, parameter, &y);
    parameter.values[4] = 6.0f;
  }
  EXPECT_EQ(y, 0.0f);
  EXPECT_THAT(emulation::Run((*queue)[0]), IsOk());
  EXPECT_EQ(y, 5.0f);
  emulation::SetLauncher(nullptr);
}

// The order in which blocks and threads get their turn is the test's.
RWKV_KERNEL(32) Takes(int* count, int* turns) { turns[BlockIndexX() * 32 + ThreadIndex()] = (*count)++; }

TEST(EmulationOrderTest, OrderIsTheOneThatWasSet) {
  std::set<std::vector<int>> orders;
  for (const auto& [order, seed] :
       std::vector<std::pair<emulation::Order, uint32_t>>{{emulation::Order::kForward, 0},
                                                          {emulation::Order::kReverse, 0},
                                                          {emulation::Order::kShuffled, 1},
                                                          {emulation::Order::kShuffled, 2},
                                                          {emulation::Order::kShuffled, 1}}) {
    emulation::SetOrder(order, seed);
    int count = 0;
    std::vector<int> turns(64);
    ASSERT_THAT(RunKernel({2, 1, 32, 0}, Takes, &count, turns.data()), IsOk());
    EXPECT_EQ(count, 64);
    if (order == emulation::Order::kForward) EXPECT_EQ(turns[33], 33);
    if (order == emulation::Order::kReverse) EXPECT_EQ(turns[33], 30);
    orders.insert(turns);
  }
  EXPECT_EQ(orders.size(), 4u) << "a seed must give its order again";
  emulation::SetOrder(emulation::Order::kForward);
}

INSTANTIATE_TEST_SUITE_P(Orders, EmulationTest,
                         ::testing::Values(emulation::Order::kForward, emulation::Order::kReverse,
                                           emulation::Order::kShuffled));

}  // namespace
}  // namespace rwkv::kernels::cuda
