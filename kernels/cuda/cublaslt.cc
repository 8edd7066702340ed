#include "kernels/cuda/cublaslt.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <type_traits>

#include "absl/strings/str_cat.h"

namespace rwkv::kernels::cuda::cublaslt {
namespace {

constexpr int kCudaMajor = CUDART_VERSION / 1000;
constexpr size_t kOfMajor = 10000;  // 13.1.0 is 130100.

}  // namespace

std::string LibraryName() { return absl::StrCat("libcublasLt.so.", kCudaMajor); }

absl::StatusOr<CublasLt> Load(const std::string& name) {
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnimplementedError(absl::StrCat("cuBLASLt: ", dlerror()));
  CublasLt lt = {};
  std::string wrong;
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
    if (function == nullptr && wrong.empty()) wrong = absl::StrCat("has no ", symbol);
  };
  find(lt.get_version, "cublasLtGetVersion");
  find(lt.get_cudart_version, "cublasLtGetCudartVersion");
  find(lt.get_status_name, "cublasLtGetStatusName");
  find(lt.create, "cublasLtCreate");
  find(lt.destroy, "cublasLtDestroy");
  find(lt.matmul_desc_create, "cublasLtMatmulDescCreate");
  find(lt.matmul_desc_destroy, "cublasLtMatmulDescDestroy");
  find(lt.matmul_desc_set_attribute, "cublasLtMatmulDescSetAttribute");
  find(lt.matrix_layout_create, "cublasLtMatrixLayoutCreate");
  find(lt.matrix_layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(lt.preference_create, "cublasLtMatmulPreferenceCreate");
  find(lt.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(lt.preference_set_attribute, "cublasLtMatmulPreferenceSetAttribute");
  find(lt.algo_get_heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(lt.algo_check, "cublasLtMatmulAlgoCheck");
  find(lt.algo_config_get_attribute, "cublasLtMatmulAlgoConfigGetAttribute");
  find(lt.matmul, "cublasLtMatmul");
  if (wrong.empty() && (lt.get_version() / kOfMajor != kCudaMajor || lt.get_cudart_version() / 1000 != kCudaMajor)) {
    wrong = absl::StrCat("is version ", lt.get_version(), " for CUDA ", lt.get_cudart_version(),
                         "; this program is built with CUDA ", CUDART_VERSION);
  }
  if (wrong.empty()) return lt;
  dlclose(library);
  return absl::UnimplementedError(absl::StrCat("cuBLASLt: ", name, " ", wrong));
}

absl::Status ToStatus(const CublasLt& library, Result result, absl::string_view what) {
  if (result == kSuccess) return absl::OkStatus();
  const std::string message = absl::StrCat("cuBLASLt: ", what, ": ", library.get_status_name(result));
  switch (result) {
    case kAllocFailed:
      return absl::ResourceExhaustedError(message);
    case kNotInitialized:
    case kArchMismatch:
    case kNotSupported:
      return absl::UnimplementedError(message);
    default:
      return absl::InternalError(message);
  }
}

}  // namespace rwkv::kernels::cuda::cublaslt
