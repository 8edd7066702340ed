// The table of cuBLASLt's functions: how it is filled, and that it is cuBLASLt's.
#include "kernels/cuda/cublaslt.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define RWKV_HAVE_CUBLASLT_HEADER 1
#else
#define RWKV_HAVE_CUBLASLT_HEADER 0
#endif

namespace rwkv::kernels::cuda::cublaslt {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(CublasLtTest, ALibraryThatIsNotThereIsUnimplementedInWords) {
  EXPECT_THAT(Load("libcublasLt-of-nobody.so"),
              StatusIs(absl::StatusCode::kUnimplemented, AllOf(HasSubstr("cuBLASLt"), HasSubstr("of-nobody.so"))));
}

TEST(CublasLtTest, ALibraryThatIsAnotherIsUnimplementedInWords) {
  EXPECT_THAT(Load("libm.so.6"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("libm.so.6 has no cublasLtGetVersion")));
}

// No driver is needed for any of these calls: the attributes' numbers and sizes are the library's.
TEST(CublasLtTest, TheRealLibraryHasTheFunctionsAndTakesTheAttributes) {
  absl::StatusOr<CublasLt> lt = Load(LibraryName());
  for (const char* const folder : {"/usr/local/cuda/lib64/", "/usr/local/cuda/lib/"}) {
    if (!lt.ok()) lt = Load(folder + LibraryName());
  }
  if (!lt.ok()) GTEST_SKIP() << "not held against the real library: " << lt.status();
  EXPECT_STREQ(lt->get_status_name(kNotSupported), "CUBLAS_STATUS_NOT_SUPPORTED");
  MatmulDesc* desc = nullptr;
  ASSERT_EQ(lt->matmul_desc_create(&desc, kComputeFloat32, kFloat32), kSuccess);
  EXPECT_EQ(lt->matmul_desc_set_attribute(desc, kDescTransA, &kTransposed, sizeof(kTransposed)), kSuccess);
  EXPECT_EQ(lt->matmul_desc_set_attribute(desc, kDescTransA, &kTransposed, 8), kInvalidValue);
  EXPECT_EQ(lt->matmul_desc_destroy(desc), kSuccess);
  MatrixLayout* layout = nullptr;
  ASSERT_EQ(lt->matrix_layout_create(&layout, kBFloat16, 64, 32, 64), kSuccess);
  EXPECT_EQ(lt->matrix_layout_destroy(layout), kSuccess);
  Preference* preference = nullptr;
  ASSERT_EQ(lt->preference_create(&preference), kSuccess);
  const uint64_t workspace = 1 << 20;
  const uint32_t alignment = 16;
  EXPECT_EQ(lt->preference_set_attribute(preference, kPreferenceMaxWorkspaceBytes, &workspace, 8), kSuccess);
  EXPECT_EQ(lt->preference_set_attribute(preference, kPreferenceReductionSchemes, &kNoReductionScheme, 4), kSuccess);
  for (int operand = 0; operand < 4; ++operand) {
    EXPECT_EQ(lt->preference_set_attribute(preference, kPreferenceMinAlignmentABytes + operand, &alignment, 4),
              kSuccess);
  }
  EXPECT_EQ(lt->preference_destroy(preference), kSuccess);
  Context* context = nullptr;
  const Result created = lt->create(&context);  // kNotInitialized where there is no driver.
  if (created == kSuccess) {
    EXPECT_EQ(lt->destroy(context), kSuccess);
  } else {
    EXPECT_THAT(ToStatus(*lt, created, "create"),
                StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("create: CUBLAS_STATUS_NOT_INITIALIZED")));
  }
}

#if RWKV_HAVE_CUBLASLT_HEADER
// Arguments and results of their function, as the ABI passes them: pointers and enums by size.
template <typename T>
constexpr int Kind() {
  return std::is_pointer_v<T> ? 1000
         : std::is_void_v<T>  ? 2000
                              : static_cast<int>(sizeof(std::conditional_t<std::is_void_v<T>, char, T>));
}
template <typename Ours, typename Theirs>
struct SameAbi : std::false_type {};
template <typename R, typename... Args, typename OtherR, typename... OtherArgs>
struct SameAbi<R (*)(Args...), OtherR (*)(OtherArgs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Args) != sizeof...(OtherArgs)) {
      return false;
    } else {
      return Kind<R>() == Kind<OtherR>() && ((Kind<Args>() == Kind<OtherArgs>()) && ... && true);
    }
  }();
};
#define RWKV_SAME_ABI(member, function) \
  static_assert(SameAbi<decltype(CublasLt::member), decltype(&function)>::value, #function)
RWKV_SAME_ABI(get_version, cublasLtGetVersion);
RWKV_SAME_ABI(get_cudart_version, cublasLtGetCudartVersion);
RWKV_SAME_ABI(get_status_name, cublasLtGetStatusName);
RWKV_SAME_ABI(create, cublasLtCreate);
RWKV_SAME_ABI(destroy, cublasLtDestroy);
RWKV_SAME_ABI(matmul_desc_create, cublasLtMatmulDescCreate);
RWKV_SAME_ABI(matmul_desc_destroy, cublasLtMatmulDescDestroy);
RWKV_SAME_ABI(matmul_desc_set_attribute, cublasLtMatmulDescSetAttribute);
RWKV_SAME_ABI(matrix_layout_create, cublasLtMatrixLayoutCreate);
RWKV_SAME_ABI(matrix_layout_destroy, cublasLtMatrixLayoutDestroy);
RWKV_SAME_ABI(preference_create, cublasLtMatmulPreferenceCreate);
RWKV_SAME_ABI(preference_destroy, cublasLtMatmulPreferenceDestroy);
RWKV_SAME_ABI(preference_set_attribute, cublasLtMatmulPreferenceSetAttribute);
RWKV_SAME_ABI(algo_get_heuristic, cublasLtMatmulAlgoGetHeuristic);
RWKV_SAME_ABI(algo_check, cublasLtMatmulAlgoCheck);
RWKV_SAME_ABI(algo_config_get_attribute, cublasLtMatmulAlgoConfigGetAttribute);
RWKV_SAME_ABI(matmul, cublasLtMatmul);

TEST(CublasLtTest, NamesNumbersAndLayoutsAreThoseOfTheHeader) {
  EXPECT_EQ(int{kSuccess}, int{CUBLAS_STATUS_SUCCESS});
  EXPECT_EQ(int{kNotInitialized}, int{CUBLAS_STATUS_NOT_INITIALIZED});
  EXPECT_EQ(int{kAllocFailed}, int{CUBLAS_STATUS_ALLOC_FAILED});
  EXPECT_EQ(int{kInvalidValue}, int{CUBLAS_STATUS_INVALID_VALUE});
  EXPECT_EQ(int{kArchMismatch}, int{CUBLAS_STATUS_ARCH_MISMATCH});
  EXPECT_EQ(int{kMappingError}, int{CUBLAS_STATUS_MAPPING_ERROR});
  EXPECT_EQ(int{kExecutionFailed}, int{CUBLAS_STATUS_EXECUTION_FAILED});
  EXPECT_EQ(int{kInternalError}, int{CUBLAS_STATUS_INTERNAL_ERROR});
  EXPECT_EQ(int{kNotSupported}, int{CUBLAS_STATUS_NOT_SUPPORTED});
  EXPECT_EQ(kFloat32, int{CUDA_R_32F});
  EXPECT_EQ(kFloat16, int{CUDA_R_16F});
  EXPECT_EQ(kBFloat16, int{CUDA_R_16BF});
  EXPECT_EQ(kComputeFloat32, int{CUBLAS_COMPUTE_32F});
  EXPECT_EQ(kDescTransA, int{CUBLASLT_MATMUL_DESC_TRANSA});
  EXPECT_EQ(kTransposed, int{CUBLAS_OP_T});
  EXPECT_EQ(kPreferenceMaxWorkspaceBytes, int{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES});
  EXPECT_EQ(kPreferenceReductionSchemes, int{CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK});
  EXPECT_EQ(kNoReductionScheme, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
  EXPECT_EQ(kPreferenceMinAlignmentABytes, int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES});
  EXPECT_EQ(kPreferenceMinAlignmentABytes + 1, int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES});
  EXPECT_EQ(kPreferenceMinAlignmentABytes + 2, int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES});
  EXPECT_EQ(kPreferenceMinAlignmentABytes + 3, int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES});
  EXPECT_EQ(static_cast<int>(Property::kId), int{CUBLASLT_ALGO_CONFIG_ID});
  EXPECT_EQ(static_cast<int>(Property::kTile), int{CUBLASLT_ALGO_CONFIG_TILE_ID});
  EXPECT_EQ(static_cast<int>(Property::kSplits), int{CUBLASLT_ALGO_CONFIG_SPLITK_NUM});
  EXPECT_EQ(static_cast<int>(Property::kReductionScheme), int{CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME});
  EXPECT_EQ(static_cast<int>(Property::kSwizzling), int{CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING});
  EXPECT_EQ(static_cast<int>(Property::kCustomOption), int{CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION});
  EXPECT_EQ(static_cast<int>(Property::kStages), int{CUBLASLT_ALGO_CONFIG_STAGES_ID});
  EXPECT_EQ(static_cast<int>(Property::kInnerShape), int{CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID});
  EXPECT_EQ(static_cast<int>(Property::kClusterShape), int{CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID});
  EXPECT_EQ(sizeof(Algorithm), sizeof(cublasLtMatmulAlgo_t));
  EXPECT_EQ(sizeof(HeuristicResult), sizeof(cublasLtMatmulHeuristicResult_t));
  EXPECT_EQ(offsetof(HeuristicResult, algorithm), offsetof(cublasLtMatmulHeuristicResult_t, algo));
  EXPECT_EQ(offsetof(HeuristicResult, workspace_bytes), offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
  EXPECT_EQ(offsetof(HeuristicResult, state), offsetof(cublasLtMatmulHeuristicResult_t, state));
  EXPECT_EQ(offsetof(HeuristicResult, waves), offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
}
#endif

}  // namespace
}  // namespace rwkv::kernels::cuda::cublaslt
