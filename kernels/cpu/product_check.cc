#include "kernels/cpu/product_check.h"

#include <cstddef>
#include <cstring>
#include <vector>

#include "kernels/base/matrix.h"

namespace rwkv::kernels::cpu {
namespace {

std::vector<float> Multiply(const KernelSet& kernels, const MatrixView& weight, const std::vector<float>& x,
                            bool round_inputs) {
  MatmulArgs args;
  args.rows = static_cast<int64_t>(x.size()) / weight.cols;
  args.weight = weight;
  args.x = x.data();
  args.round_inputs = round_inputs;
  std::vector<float> y(static_cast<size_t>(args.rows * weight.rows));
  args.y = y.data();
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> prepared(static_cast<size_t>(kernels.matmul_prepared_bytes(args) / 64 + 1));
  std::vector<Line> workspace(static_cast<size_t>(kernels.matmul_workspace_bytes(args) / 64 + 1));
  args.prepared = prepared.data();
  if (kernels.matmul_prepared_bytes(args) > 0) kernels.prepare_rows(args, 0, args.rows);
  for (int64_t part = 0; part < kernels.matmul_parts(args); ++part) kernels.matmul(args, part, workspace.data());
  return y;
}

}  // namespace

uint64_t HashOfProducts(const KernelSet& kernels) {
  constexpr int64_t kInputs = 150, kOutputs = 37, kGroups = 3;
  std::vector<int8_t> codes(kOutputs * kInputs);
  std::vector<uint16_t> scales(kOutputs * kGroups), weights(kOutputs * kInputs);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint16_t>(0x2000 + i * 71 % 0x800);
  for (size_t i = 0; i < weights.size(); ++i) {  // Of both signs, from 2^-7 to 2.
    weights[i] = static_cast<uint16_t>(i % 3 % 2 << 15 | (0x3c00 + i * 89 % 0x400));
  }
  MatrixView of_bytes;
  of_bytes.rows = kOutputs;
  of_bytes.cols = kInputs;
  MatrixView of_bf16 = of_bytes;
  of_bytes.data = codes.data();
  of_bytes.quantization = Quantization::kInt8;
  of_bytes.group = 64;
  of_bytes.scales = scales.data();
  of_bf16.data = weights.data();
  of_bf16.dtype = DType::kBFloat16;

  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a word at a time
  for (const size_t rows : {1, 19, 50}) {
    std::vector<float> x(rows * kInputs);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 613 % 100003) / 25600.0f - 2.0f;
    for (const MatrixView& weight : {of_bytes, of_bf16}) {
      for (const bool round_inputs : {false, true}) {
        for (const float y : Multiply(kernels, weight, x, round_inputs)) {
          uint32_t bits;
          std::memcpy(&bits, &y, sizeof bits);
          hash = (hash ^ bits) * 0x100000001b3u;
        }
      }
    }
  }
  return hash;
}

}  // namespace rwkv::kernels::cpu
