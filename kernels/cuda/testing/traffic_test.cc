// That traffic is counted as it is, and that reads that waste sectors or banks show.
#include "kernels/cuda/testing/traffic.h"

#include "gtest/gtest.h"
#include "kernels/cuda/testing/mutants.h"

namespace rwkv::kernels::cuda {
namespace {

KernelTraffic TrafficOf(Mutant mutant) {
  alignas(256) float x[128] = {};
  alignas(256) float y[128] = {};
  Traffic traffic;
  EXPECT_EQ(LaunchMutant(mutant, x, y), 0);
  EXPECT_EQ(traffic.kernels().size(), 1u);
  return traffic.kernels().at("mutant");
}

// Two blocks read 64 floats twice and write them once; each of their two warps asks shared memory six times.
TEST(TrafficTest, EveryByteIsCounted) {
#if __has_feature(thread_sanitizer)
  GTEST_SKIP() << "the thread sanitizer's own library hears of the accesses here";
#endif
  const KernelTraffic traffic = TrafficOf(Mutant::kNone);
  EXPECT_EQ(traffic.bytes, 2 * 64 * 4 * 3);
  EXPECT_EQ(traffic.wide_bytes, 0);
  EXPECT_EQ(traffic.used_bytes, traffic.bytes);
  EXPECT_EQ(traffic.sector_bytes, traffic.bytes);
  EXPECT_EQ(traffic.shared_requests, 2 * 2 * (2 * 2 + 2));
  EXPECT_EQ(traffic.shared_conflicts, 0);
}

TEST(TrafficTest, WasteShows) {
#if __has_feature(thread_sanitizer)
  GTEST_SKIP() << "the thread sanitizer's own library hears of the accesses here";
#endif
  const KernelTraffic strided = TrafficOf(Mutant::kStrided);
  EXPECT_EQ(strided.used_bytes, 2 * 64 * 4 * 3);
  EXPECT_EQ(strided.sector_bytes, 2 * 64 * 4 * (2 * 2 + 1));
  EXPECT_EQ(strided.shared_conflicts, 0);
  const KernelTraffic conflicts = TrafficOf(Mutant::kConflicts);
  EXPECT_EQ(conflicts.sector_bytes, conflicts.used_bytes);
  EXPECT_EQ(conflicts.shared_conflicts, 2 * 2 * 2);
}

}  // namespace
}  // namespace rwkv::kernels::cuda
