#include <string>
#include <vector>

#include "bazel/rules/cuda_library_test/square.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv {
namespace {

#if RWKV_HAVE_CUDA
// Building and linking it is half of the test.
TEST(CudaLibraryTest, KernelRunsWhereADeviceIs) {
  std::vector<float> values = {1, 2, 3, -4};
  bool no_device = false;
  const std::string error = SquareOnDevice(values.data(), static_cast<int>(values.size()), &no_device);
  if (no_device) GTEST_SKIP() << "built by nvcc, but there is no device: " << error;
  EXPECT_EQ(error, "");
  EXPECT_THAT(values, ::testing::ElementsAre(1, 4, 9, 16));
}
#else
TEST(CudaLibraryTest, KernelRunsWhereADeviceIs) { GTEST_SKIP() << "built without nvcc: CPU only"; }
#endif

}  // namespace
}  // namespace rwkv
