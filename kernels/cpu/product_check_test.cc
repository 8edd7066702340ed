#include "kernels/cpu/product_check.h"

#include "gtest/gtest.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/emulated_amx.h"

namespace rwkv::kernels::cpu {
namespace {

#if defined(__x86_64__)
// So AMX is used where it computes as its plain twin does.
TEST(ProductCheckTest, TheHashIsThePlainTwins) {
  if (!HasEmulatedAmx()) GTEST_SKIP() << "this processor has no AVX-512 VNNI";
  EXPECT_EQ(HashOfProducts(kEmulatedAmxKernels), kHashOfTileProducts);
}
#endif

// Kernels that add in another order are told apart.
TEST(ProductCheckTest, OtherSumsHaveAnotherHash) {
  for (const Backend& backend : Backends()) {
    if (!backend.runs_here || backend.kernels == &kAmxKernels) continue;
    EXPECT_NE(HashOfProducts(*backend.kernels), kHashOfTileProducts) << backend.name;
  }
}

}  // namespace
}  // namespace rwkv::kernels::cpu
