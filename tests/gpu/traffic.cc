// What each kernel of a decode step asks of memory, as JSON lines on standard output: kernels built for the checker, at
// a small shape with heads of 64, 1 row and 16.
#include "kernels/cuda/testing/traffic.h"

#include <cstdint>
#include <deque>
#include <iostream>
#include <string>
#include <vector>

#include "kernels/cuda/kernel_set.h"

namespace rwkv::kernels::cuda {
namespace {

constexpr int64_t kWidth = 256;
constexpr int64_t kHead = 64;

// 256-byte aligned, as CUDA's own.
class Memory {
 public:
  float* Floats(int64_t count) {
    floats_.emplace_back(static_cast<size_t>(count + 64), 0.25f);
    float* data = floats_.back().data();
    while (reinterpret_cast<uintptr_t>(data) % 256 != 0) ++data;
    return data;
  }

 private:
  std::deque<std::vector<float>> floats_;
};

int Step(int64_t rows) {
  Memory memory;
  std::vector<SequenceSpan> spans;
  for (int64_t row = 0; row < rows; ++row) spans.push_back({static_cast<int32_t>(row), row, 1});
  StepRows step;
  step.rows = step.span_count = rows;
  step.spans = spans.data();
  int error = 0;

  LayerNormArgs norm;
  norm.rows = rows;
  norm.width = kWidth;
  norm.x = memory.Floats(rows * kWidth);
  norm.weight = memory.Floats(kWidth);
  norm.bias = memory.Floats(kWidth);
  norm.y = memory.Floats(rows * kWidth);
  error |= kCheckedKernels.layer_norm(norm, nullptr);

  MixInputArgs mix;
  mix.step = &step;
  mix.width = kWidth;
  mix.x = norm.x;
  mix.weight = norm.weight;
  mix.bias = norm.bias;
  mix.shift = {memory.Floats(rows * kWidth), kWidth};
  mix.outputs = 6;
  for (int m = 0; m < 6; ++m) {
    mix.mix[m] = memory.Floats(kWidth);
    mix.y[m] = memory.Floats(rows * kWidth);
  }
  error |= kCheckedKernels.mix_input(mix, nullptr);

  Weight weight;
  weight.matrix = {DType::kBFloat16, kWidth, kWidth, memory.Floats(kWidth * kWidth / 2)};
  Product product;
  product.weight = &weight;
  product.x = norm.x;
  product.y = memory.Floats(rows * kWidth);
  error |= kCheckedKernels.tensor_products({rows, &product, 1}, nullptr);
  error |= kCheckedKernels.rounded_products({rows, &product, 1}, nullptr);
  error |= kCheckedKernels.products({rows, &product, 1}, nullptr);

  Weight codes;
  codes.matrix = {DType::kFloat16, kWidth, kWidth, memory.Floats(kWidth * kWidth / 4)};
  codes.matrix.quantization = Quantization::kInt8;
  codes.matrix.group = 64;  // As rwkvctl writes them.
  codes.matrix.scales = reinterpret_cast<const uint16_t*>(memory.Floats(kWidth * kWidth / 64 / 2));
  product.weight = &codes;
  error |= kCheckedKernels.tensor_products({rows, &product, 1}, nullptr);
  error |= kCheckedKernels.products({rows, &product, 1}, nullptr);

  Wkv7Args wkv;
  wkv.step = &step;
  wkv.heads = kWidth / kHead;
  wkv.head_size = kHead;
  wkv.state = {memory.Floats(rows * kWidth * kHead), kWidth * kHead};
  for (const float** vector :
       {&wkv.decay_bias, &wkv.iclr_bias, &wkv.k_k, &wkv.k_a, &wkv.bonus, &wkv.ln_weight, &wkv.ln_bias}) {
    *vector = memory.Floats(kWidth);
  }
  for (const float** vector : {&wkv.r, &wkv.k, &wkv.v, &wkv.g, &wkv.decay_lora, &wkv.iclr_lora}) {
    *vector = memory.Floats(rows * kWidth);
  }
  wkv.y = memory.Floats(rows * kWidth);
  error |= kCheckedKernels.wkv7(wkv, nullptr);
  return error;
}

double Share(int64_t part, int64_t all) {
  return all == 0 ? 1.0 : static_cast<double>(part) / static_cast<double>(all);
}

int Main() {
  for (const int64_t rows : {1, 16}) {
    Traffic traffic;
    if (Step(rows) != 0) {
      std::cerr << "traffic: a launch failed\n";
      return 1;
    }
    for (const auto& [name, of] : traffic.kernels()) {
      std::cout << "{\"kernel\": \"" << name << "\", \"rows\": " << rows << ", \"bytes\": " << of.bytes
                << ", \"wide\": " << Share(of.wide_bytes, of.bytes)
                << ", \"sectors\": " << Share(of.used_bytes, of.sector_bytes)
                << ", \"conflicts\": " << Share(of.shared_conflicts, of.shared_requests) << "}\n";
    }
  }
  return 0;
}

}  // namespace
}  // namespace rwkv::kernels::cuda

int main() { return rwkv::kernels::cuda::Main(); }
