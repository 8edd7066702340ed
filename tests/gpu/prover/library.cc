#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/api/op_table.h"
#include "kernels/api/products.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/library_products.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"

namespace rwkv::gpu {
namespace {

namespace cuda = kernels::cuda;

// What it chooses for the matrices of a layer.
absl::Status PrintChoices(const Gpu& gpu, const std::string& name, int64_t width) {
  absl::StatusOr<cuda::cublaslt::CublasLt> table = cuda::cublaslt::kFakeCublasLt;
  if (!gpu.is_emulated) table = cuda::cublaslt::Load(cuda::cublaslt::LibraryName());
  RWKV_RETURN_IF_ERROR(table.status());
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<cuda::LibraryProducts> library,
                        cuda::LibraryProducts::Create(*table, name, cuda::kLibraryRows));
  for (const auto& [outputs, inputs] :
       {std::pair(width, width), {4 * width, width}, {width, 4 * width}, {int64_t{96}, width}, {width, int64_t{96}}}) {
    const kernels::MatrixView matrix = {kernels::DType::kBFloat16, outputs, inputs};
    RWKV_RETURN_IF_ERROR(library->Choose(matrix));
    for (const std::string& choice : library->Choices(matrix)) std::cout << "{\"choice\": \"" << choice << "\"}\n";
  }
  return absl::OkStatus();
}

// Operations a second of products of many rows, their rounding included.
absl::StatusOr<double> Rate(const Gpu& gpu, int64_t rows, int64_t width) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Stream> stream, gpu.device->NewStream());
  std::vector<uint16_t> weights(static_cast<size_t>(width * width));
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<uint16_t>(0x3c00 + i % 241);  // About 0.01.
  RWKV_ASSIGN_OR_RETURN(
      const kernels::Weight weight,
      gpu.device->Load({kernels::DType::kBFloat16, width, width, weights.data()}, kernels::WeightUse::kProduct));
  RWKV_ASSIGN_OR_RETURN(const auto x, kernels::DeviceArray<float>::Create(*gpu.device, rows * width));
  RWKV_ASSIGN_OR_RETURN(const auto y, kernels::DeviceArray<float>::Create(*gpu.device, rows * width));
  // Not zeros: a GPU multiplies those at higher clocks.
  RWKV_ASSIGN_OR_RETURN(const auto values,
                        kernels::DeviceArray<float>::Create(*gpu.device, x.size(), kernels::MemoryKind::kPinned));
  for (int64_t i = 0; i < values.size(); ++i) values.data()[i] = static_cast<float>(i % 251 - 125) / 64.0f;
  RWKV_RETURN_IF_ERROR(stream->Copy(x.data(), values.data(), x.size_in_bytes()));
  kernels::Product product;
  product.weight = &weight;
  product.x = x.data();
  product.y = y.data();
  constexpr int kRepeats = 10;
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const double begin = Now();
    for (int r = 0; r < kRepeats; ++r) RWKV_RETURN_IF_ERROR(gpu.device->ops().products({rows, &product, 1}, *stream));
    RWKV_RETURN_IF_ERROR(stream->Synchronize());
    best = std::max(best, kRepeats * 2.0 * static_cast<double>(rows * width * width) / (Now() - begin));
  }
  return best;
}

}  // namespace

absl::Status Library(const std::string& device) {
  const std::string name = absl::StrCat(device, "/lt");
  const absl::StatusOr<Gpu> gpu = OpenGpu(name);
  if (absl::IsUnimplemented(gpu.status())) {
    std::cout << "NOT RUN: " << gpu.status().message() << std::endl;
    return absl::OkStatus();
  }
  RWKV_RETURN_IF_ERROR(gpu.status());
  RWKV_RETURN_IF_ERROR(PrintChoices(*gpu, name, 2048));
  RWKV_ASSIGN_OR_RETURN(const double rate,
                        Rate(*gpu, gpu->is_emulated ? 8 : cuda::kMostLibraryRows, gpu->is_emulated ? 64 : 8192));
  std::cout << absl::StrFormat("{\"library_tflop_per_s\": %.1f}\n", rate / 1e12)
            << absl::StrFormat("SAYS: family %s, %.1f Tflop/s", gpu->device->numeric_family(), rate / 1e12)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace rwkv::gpu
