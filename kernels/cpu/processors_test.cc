#include "kernels/cpu/processors.h"

#include <filesystem>
#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace rwkv::kernels::cpu {
namespace {

class ProcessorsTest : public ::testing::Test {
 protected:
  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + "/" + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }

  const std::string root_ = ::testing::TempDir() + ::testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(ProcessorsTest, NoQuotaIsZero) {
  EXPECT_EQ(ProcessorQuota("0::/\n", root_), 0);
  EXPECT_EQ(ProcessorQuota("", root_), 0);
  Write("cpu.max", "max 100000\n");
  EXPECT_EQ(ProcessorQuota("0::/\n", root_), 0);
  Write("cpu/cpu.cfs_quota_us", "-1\n");
  Write("cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(ProcessorQuota("3:cpu,cpuacct:/\n", root_), 0);
}

TEST_F(ProcessorsTest, QuotaOfVersionTwoIsRoundedUp) {
  Write("cpu.max", "250000 100000\n");
  EXPECT_EQ(ProcessorQuota("0::/\n", root_), 3);
}

TEST_F(ProcessorsTest, QuotaOfVersionOneIsThatOfTheCpuController) {
  Write("cpu/pod/cpu.cfs_quota_us", "400000\n");
  Write("cpu/pod/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(ProcessorQuota("4:memory:/other\n3:cpu,cpuacct:/pod\n", root_), 4);
}

TEST_F(ProcessorsTest, TheSmallestQuotaOfAGroupAndAllAboveCounts) {
  Write("a/cpu.max", "150000 100000\n");
  Write("a/b/cpu.max", "800000 100000\n");
  EXPECT_EQ(ProcessorQuota("0::/a/b\n", root_), 2);
  EXPECT_EQ(ProcessorQuota("0::/a\n", root_), 2);
}

TEST_F(ProcessorsTest, InAContainerTheMountItselfIsAsked) {
  Write("cpu.max", "100000 100000\n");
  EXPECT_EQ(ProcessorQuota("0::/kubepods/of/the/host\n", root_), 1);
}

TEST_F(ProcessorsTest, ThisProcessHasSome) { EXPECT_GE(ProcessorsOfThisProcess(), 1); }

}  // namespace
}  // namespace rwkv::kernels::cpu
