// The functions of cuBLASLt that the device uses, as a table: those of the library that is found when the device is
// opened, and for tests a fake (testing/fake_cublaslt.h). The library is no part of the build and its header is not
// included: names, numbers and layouts here are its ABI, which cublaslt_test holds against the header where there is
// one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda/launch_shape.h"

namespace rwkv::kernels::cuda::cublaslt {

enum Result : int {  // cublasStatus_t
  kSuccess = 0,
  kNotInitialized = 1,
  kAllocFailed = 3,
  kInvalidValue = 7,
  kArchMismatch = 8,
  kMappingError = 11,
  kExecutionFailed = 13,
  kInternalError = 14,
  kNotSupported = 15,
};

// cudaDataType_t
constexpr int kFloat32 = 0;
constexpr int kFloat16 = 2;
constexpr int kBFloat16 = 14;
constexpr int kComputeFloat32 = 68;  // cublasComputeType_t

// Attributes, with the type of their value.
constexpr int kDescTransA = 3;                    // int32_t
constexpr int32_t kTransposed = 1;                // cublasOperation_t
constexpr int kPreferenceMaxWorkspaceBytes = 1;   // uint64_t
constexpr int kPreferenceReductionSchemes = 3;    // uint32_t; none: a sum is one sequence, never split among blocks
constexpr uint32_t kNoReductionScheme = 0;        //
constexpr int kPreferenceMinAlignmentABytes = 5;  // uint32_t, as those of B, C and D behind it

// Of an algorithm: four bytes each but for the last two, which have two.
enum class Property : int {
  kId = 0,
  kTile = 1,
  kSplits = 2,
  kReductionScheme = 3,
  kSwizzling = 4,
  kCustomOption = 5,
  kStages = 6,
  kInnerShape = 7,
  kClusterShape = 8,
};
constexpr int kProperties = 9;
inline size_t SizeOf(Property property) { return property >= Property::kInnerShape ? 2 : 4; }

struct Algorithm {
  uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Result state;  // Unless it is kSuccess, nothing else here means anything.
  float waves;
  int reserved[4];
};

// What handles point to is the library's.
struct Context;
struct MatmulDesc;
struct MatrixLayout;
struct Preference;

struct CublasLt {
  size_t (*get_version)();         // 130100 is 13.1.0
  size_t (*get_cudart_version)();  // of the runtime that it was built with: 13000 is 13.0
  const char* (*get_status_name)(Result result);
  Result (*create)(Context** context);  // Of the thread's device.
  Result (*destroy)(Context* context);
  Result (*matmul_desc_create)(MatmulDesc** desc, int compute_type, int scale_type);
  Result (*matmul_desc_destroy)(MatmulDesc* desc);
  Result (*matmul_desc_set_attribute)(MatmulDesc* desc, int attribute, const void* value, size_t bytes);
  Result (*matrix_layout_create)(MatrixLayout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld);
  Result (*matrix_layout_destroy)(MatrixLayout* layout);
  Result (*preference_create)(Preference** preference);
  Result (*preference_destroy)(Preference* preference);
  Result (*preference_set_attribute)(Preference* preference, int attribute, const void* value, size_t bytes);
  Result (*algo_get_heuristic)(Context* context, MatmulDesc* desc, MatrixLayout* a, MatrixLayout* b, MatrixLayout* c,
                               MatrixLayout* d, Preference* preference, int wanted, HeuristicResult* results,
                               int* count);
  Result (*algo_check)(Context* context, MatmulDesc* desc, MatrixLayout* a, MatrixLayout* b, MatrixLayout* c,
                       MatrixLayout* d, const Algorithm* algorithm, HeuristicResult* result);
  Result (*algo_config_get_attribute)(const Algorithm* algorithm, int property, void* value, size_t bytes,
                                      size_t* written);
  Result (*matmul)(Context* context, MatmulDesc* desc, const void* alpha, const void* a, MatrixLayout* a_layout,
                   const void* b, MatrixLayout* b_layout, const void* beta, const void* c, MatrixLayout* c_layout,
                   void* d, MatrixLayout* d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
                   StreamHandle stream);
};

// What the dynamic linker finds, of the CUDA that this program is built with: libcublasLt.so.13.
std::string LibraryName();

// The table of the shared library `name`, which stays loaded. kUnimplemented: it is not there, lacks a function, or is
// of another CUDA than this program; says what.
absl::StatusOr<CublasLt> Load(const std::string& name);

// Its results as absl::Status: the one place. `what`, in the message: what was wanted.
absl::Status ToStatus(const CublasLt& library, Result result, absl::string_view what);

}  // namespace rwkv::kernels::cuda::cublaslt
