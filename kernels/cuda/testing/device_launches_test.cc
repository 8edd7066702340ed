// What nvcc's build of the kernels asks CUDA for is what the other build asks the emulation for, launch by launch:
// blocks, threads and shared memory, the stream, and to overlap with the kernel before where the stream does.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/weight.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda {
namespace {

struct Asked {
  uint32_t grid_x, grid_y, threads, shared_bytes;
  bool overlaps;

  bool operator==(const Asked& other) const {
    return grid_x == other.grid_x && grid_y == other.grid_y && threads == other.threads &&
           shared_bytes == other.shared_bytes && overlaps == other.overlaps;
  }
};

std::ostream& operator<<(std::ostream& out, const Asked& asked) {
  return out << "[" << asked.grid_x << " x " << asked.grid_y << " blocks of " << asked.threads << " threads and "
             << asked.shared_bytes << " bytes" << (asked.overlaps ? ", overlaps]" : "]");
}

std::vector<Asked> all_asked;
CUstream_st* the_stream = nullptr;  // Of the launches.

}  // namespace
}  // namespace rwkv::kernels::cuda

// In place of CUDA's own, by the linker's --wrap.
extern "C" cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  using namespace rwkv::kernels::cuda;  // NOLINT
  EXPECT_EQ(config->stream, the_stream);
  EXPECT_EQ(config->gridDim.z * config->blockDim.y * config->blockDim.z, 1u);
  EXPECT_LE(config->numAttrs, 1u);
  bool overlaps = false;
  for (unsigned int i = 0; i < config->numAttrs; ++i) {
    overlaps = config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
               config->attrs[i].val.programmaticStreamSerializationAllowed == 1;
    EXPECT_TRUE(overlaps) << "another attribute";
  }
  all_asked.push_back({config->gridDim.x, config->gridDim.y, config->blockDim.x,
                       static_cast<uint32_t>(config->dynamicSmemBytes), overlaps});
  return cudaSuccess;
}

namespace rwkv::kernels::cuda {
namespace {

class DeviceLaunchesTest : public ::testing::Test {
 protected:
  DeviceLaunchesTest() {
    the_stream = reinterpret_cast<CUstream_st*>(memory_);
    emulation::SetLauncher([](StreamHandle, emulation::Kernel kernel) {
      all_asked.push_back(
          {kernel.shape.grid_x, kernel.shape.grid_y, kernel.shape.threads, kernel.shape.shared_bytes, kernel.overlaps});
      return 0;
    });
  }
  ~DeviceLaunchesTest() override { emulation::SetLauncher(nullptr); }

  // Both builds, with and without overlap.
  void ExpectSame(const char* what, size_t launches, const std::function<int(const KernelSet&, LaunchStream)>& launch) {
    for (const bool overlaps : {false, true}) {
      all_asked.clear();
      EXPECT_EQ(launch(kEmulatedKernels, {the_stream, overlaps}), 0) << what;
      const std::vector<Asked> expected = std::exchange(all_asked, {});
      EXPECT_EQ(launch(kDeviceKernels, {the_stream, overlaps}), 0) << what;
      EXPECT_EQ(all_asked, expected) << what;
      EXPECT_EQ(expected.size(), launches) << what;
      for (const Asked& asked : all_asked) EXPECT_EQ(asked.overlaps, overlaps) << what;
    }
  }

  alignas(16) float memory_[16] = {};
  SequenceSpan spans_[5] = {{0, 0, 1}, {1, 1, 1}, {2, 2, 1}, {3, 3, 3}, {4, 6, 1}};
  StepRows step_ = {7, 5, spans_};
};

TEST_F(DeviceLaunchesTest, Rows) {
  LayerNormArgs norm;
  norm.rows = 3;
  norm.width = 130;
  ExpectSame("layer_norm", 1, [&](const KernelSet& set, LaunchStream stream) { return set.layer_norm(norm, stream); });
  Weight weight;
  weight.matrix = {DType::kFloat32, 5, 130};
  EmbedArgs embed;
  embed.rows = 3;
  embed.embedding = &weight;
  ExpectSame("embed", 1, [&](const KernelSet& set, LaunchStream stream) { return set.embed(embed, stream); });
  MixInputArgs mix;
  mix.step = &step_;
  mix.width = 130;
  ExpectSame("mix_input", 2, [&](const KernelSet& set, LaunchStream stream) { return set.mix_input(mix, stream); });
  const DeepEmbedArgs deep = {3, 32, memory_, memory_, memory_};
  ExpectSame("deep_embed", 1, [&](const KernelSet& set, LaunchStream stream) { return set.deep_embed(deep, stream); });
  SampleArgs sample;
  sample.count = 3;
  sample.vocab = 70;
  ExpectSame("sample", 1, [&](const KernelSet& set, LaunchStream stream) { return set.sample(sample, stream); });
  const CastStateArgs cast = {257, true, memory_, nullptr};
  ExpectSame("cast_state", 1, [&](const KernelSet& set, LaunchStream stream) { return set.cast_state(cast, stream); });
}

TEST_F(DeviceLaunchesTest, Heads) {
  Wkv4Args wkv4;
  wkv4.step = &step_;
  wkv4.width = 65;
  ExpectSame("wkv4", 1, [&](const KernelSet& set, LaunchStream stream) { return set.wkv4(wkv4, stream); });
  for (const int64_t n : {16, 32, 33, 64, 128}) {
    Wkv6Args wkv6;
    wkv6.step = &step_;
    wkv6.heads = 3;
    wkv6.head_size = n;
    ExpectSame("wkv6", 1, [&](const KernelSet& set, LaunchStream stream) { return set.wkv6(wkv6, stream); });
    Wkv7Args wkv7;
    wkv7.step = &step_;
    wkv7.heads = 3;
    wkv7.head_size = n;
    ExpectSame("wkv7", 1, [&](const KernelSet& set, LaunchStream stream) { return set.wkv7(wkv7, stream); });
  }
  for (const int64_t width : {32, 700, 1500, 3000}) {
    Weight k2, v2;
    k2.matrix = {DType::kFloat16, 33, 32};
    v2.matrix = {DType::kFloat16, width, 32};
    DeepEmbedAttentionArgs attention;
    attention.step = &step_;
    attention.k2 = &k2;
    attention.v2 = &v2;
    ExpectSame("deep_embed_attention", 2,
               [&](const KernelSet& set, LaunchStream stream) { return set.deep_embed_attention(attention, stream); });
  }
}

TEST_F(DeviceLaunchesTest, Products) {
  MatrixView codes = {DType::kFloat16, 33, 64};
  codes.quantization = Quantization::kInt8;
  codes.group = 32;
  MatrixView nibbles = codes;
  nibbles.quantization = Quantization::kInt4;
  for (const MatrixView& matrix : {MatrixView{DType::kFloat32, 33, 64}, MatrixView{DType::kBFloat16, 33, 64},
                                   MatrixView{DType::kFloat16, 33, 63}, codes, nibbles}) {
    for (const int64_t rows : {1, 3, 9, 17}) {
      Weight weight;
      weight.matrix = matrix;
      Product product;
      product.weight = &weight;
      product.x = memory_;
      const ProductsArgs args = {rows, &product, 1};
      ExpectSame("products", 1, [&](const KernelSet& set, LaunchStream stream) { return set.products(args, stream); });
      ExpectSame("tensor_products", 1,
                 [&](const KernelSet& set, LaunchStream stream) { return set.tensor_products(args, stream); });
      ExpectSame("rounded_products", 1,
                 [&](const KernelSet& set, LaunchStream stream) { return set.rounded_products(args, stream); });
    }
  }
  RoundInputsArgs round;
  round.x = memory_;
  round.rows = 3, round.inputs = 100, round.to_rows = 16, round.pitch = 112;
  ExpectSame("round_inputs", 1,
             [&](const KernelSet& set, LaunchStream stream) { return set.round_inputs(round, stream); });
  Weight weight;
  weight.matrix = {DType::kBFloat16, 300, 64};
  Product product;
  product.weight = &weight;
  const FinishProductArgs finish = {&product, 3, memory_, 300};
  ExpectSame("finish_product", 1,
             [&](const KernelSet& set, LaunchStream stream) { return set.finish_product(finish, stream); });
}

}  // namespace
}  // namespace rwkv::kernels::cuda
