// How large launches are, by the sizes of what they compute: a block too many or too few may change no result, and how
// many rows and outputs a block has never does.
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/weight.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda {
namespace {

using ::testing::ElementsAre;

// Name, blocks, threads of a block, bytes of shared memory of a block.
using Shape = std::tuple<std::string, uint32_t, uint32_t, uint32_t>;

class LaunchShapesTest : public ::testing::Test {
 protected:
  LaunchShapesTest() {
    shapes_.clear();
    fails_at_ = 0;
    emulation::SetLauncher([](StreamHandle, emulation::Kernel kernel) {
      EXPECT_EQ(kernel.shape.grid_y, 1u);
      shapes_.emplace_back(kernel.name, kernel.shape.grid_x, kernel.shape.threads, kernel.shape.shared_bytes);
      return static_cast<int>(shapes_.size()) == fails_at_ ? 719 : 0;  // Nothing runs.
    });
  }
  ~LaunchShapesTest() override { emulation::SetLauncher(nullptr); }

  static std::vector<Shape> Take() { return std::exchange(shapes_, {}); }

  using Launch = int (*)(const ProductsArgs& args, LaunchStream stream);

  // Of products with matrices of so many outputs and 64 inputs.
  std::vector<Shape> Products(const MatrixView& like, int64_t rows, std::vector<int64_t> outputs, bool tensor,
                              int64_t inputs = 64) {
    return Products(like, rows, outputs, tensor ? kEmulatedKernels.tensor_products : kEmulatedKernels.products, inputs);
  }
  std::vector<Shape> Products(const MatrixView& like, int64_t rows, std::vector<int64_t> outputs, Launch launch,
                              int64_t inputs) {
    std::vector<Weight> weights(outputs.size());
    std::vector<Product> products(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      weights[i].matrix = like;
      weights[i].matrix.rows = outputs[i];
      weights[i].matrix.cols = inputs;
      products[i].weight = &weights[i];
      products[i].x = memory_;
    }
    const ProductsArgs args = {rows, products.data(), static_cast<int64_t>(products.size())};
    EXPECT_EQ(launch(args, nullptr), 0);
    return Take();
  }

  alignas(16) float memory_[16] = {};
  SequenceSpan spans_[5] = {{0, 0, 1}, {1, 1, 1}, {2, 2, 1}, {3, 3, 3}, {4, 6, 1}};
  static std::vector<Shape> shapes_;
  static int fails_at_;  // The launch, from 1 on, that has an error; 0: none.
};

std::vector<Shape> LaunchShapesTest::shapes_;
int LaunchShapesTest::fails_at_ = 0;

MatrixView Codes(Quantization quantization) {
  MatrixView matrix = {DType::kFloat16, 1, 1};
  matrix.quantization = quantization;
  matrix.group = 32;
  return matrix;
}

TEST_F(LaunchShapesTest, ProductsHaveTilesByTheNumberOfRows) {
  const MatrixView floats = {DType::kFloat32, 1, 1};
  for (const bool tensor : {false, true}) {
    EXPECT_THAT(Products(floats, 1, {9}, tensor), ElementsAre(Shape("products", 3, 128, 0)));
    EXPECT_THAT(Products(floats, 2, {9}, tensor), ElementsAre(Shape("products", 2, 128, 0)));
    EXPECT_THAT(Products(floats, 4, {9}, tensor), ElementsAre(Shape("products", 2, 128, 0)));
    EXPECT_THAT(Products(floats, 5, {17}, tensor), ElementsAre(Shape("products", 2, 128, 0)));
    EXPECT_THAT(Products(floats, 17, {16}, tensor), ElementsAre(Shape("products", 3, 128, 0)));
    EXPECT_THAT(Products(floats, 3, {9}, tensor, 63), ElementsAre(Shape("products", 9, 128, 0))) << "not by 16 bytes";
  }
}

TEST_F(LaunchShapesTest, TensorProductsHaveTilesByTheNumberOfRows) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const MatrixView halves = {dtype, 1, 1};
    constexpr uint32_t kSmall = 8 * 8 * 20 * 4;
    for (const int64_t rows : {1, 8}) {
      EXPECT_THAT(Products(halves, rows, {33}, true), ElementsAre(Shape("tensor_products", 3, 256, kSmall)));
    }
    for (const int64_t rows : {9, 16}) {
      EXPECT_THAT(Products(halves, rows, {33}, true), ElementsAre(Shape("tensor_products", 3, 256, 2 * kSmall)));
    }
    constexpr uint32_t kLarge = 8 * 32 * 36 * 4;
    EXPECT_THAT(Products(halves, 17, {33}, true), ElementsAre(Shape("tensor_products", 2, 256, kLarge)));
    EXPECT_THAT(Products(halves, 33, {33}, true), ElementsAre(Shape("tensor_products", 4, 256, kLarge)));
    EXPECT_THAT(Products(halves, 1, {9}, false), ElementsAre(Shape("products", 3, 128, 0)));
    for (const auto& [rows, blocks, bytes] : std::vector<std::tuple<int64_t, uint32_t, uint32_t>>{
             {8, 3, kSmall}, {9, 3, 2 * kSmall}, {16, 3, 2 * kSmall}, {17, 2, kLarge}, {33, 4, kLarge}}) {
      EXPECT_THAT(Products(halves, rows, {33}, kEmulatedKernels.rounded_products, 64),
                  ElementsAre(Shape("rounded_products", blocks, 256, bytes)));
    }
  }
}

// Four inputs a thread, of rows up to the bucket; and an output.
TEST_F(LaunchShapesTest, WhatGoesAroundALibrarysProductHasAThreadForEachPiece) {
  for (const auto& [rows, pitch, blocks] :
       std::vector<std::tuple<int64_t, int64_t, uint32_t>>{{4, 16, 1}, {16, 64, 1}, {16, 80, 2}, {128, 48, 6}}) {
    RoundInputsArgs args;
    args.x = memory_;
    args.rows = 3;
    args.inputs = pitch;
    args.to_rows = rows;
    args.pitch = pitch;
    EXPECT_EQ(kEmulatedKernels.round_inputs(args, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("round_inputs", blocks, 256, 0)));
  }
  for (const auto& [rows, outputs, blocks] :
       std::vector<std::tuple<int64_t, int64_t, uint32_t>>{{4, 64, 1}, {5, 64, 2}, {3, 257, 4}}) {
    Weight weight;
    weight.matrix = {DType::kBFloat16, outputs, 64};
    Product product;
    product.weight = &weight;
    EXPECT_EQ(kEmulatedKernels.finish_product({&product, rows, memory_, outputs}, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("finish_product", blocks, 256, 0)));
  }
}

TEST_F(LaunchShapesTest, FixedPointProductsHaveTilesByTheNumberOfRows) {
  for (const Quantization quantization : {Quantization::kInt8, Quantization::kInt4}) {
    const MatrixView codes = Codes(quantization);
    const auto shared = [](uint32_t groups, uint32_t rows, uint32_t outputs) {
      return groups * rows * (outputs + 4 + 2) * 4;
    };
    for (const int64_t rows : {1, 8}) {
      EXPECT_THAT(Products(codes, rows, {33}, true),
                  ElementsAre(Shape("tensor_fixed_products", 3, 256, shared(32, 8, 16))));
    }
    for (const int64_t rows : {9, 16}) {
      EXPECT_THAT(Products(codes, rows, {33}, true),
                  ElementsAre(Shape("tensor_fixed_products", 3, 256, shared(16, 16, 16))));
    }
    EXPECT_THAT(Products(codes, 17, {65}, true),
                ElementsAre(Shape("tensor_fixed_products", 4, 256, shared(8, 16, 64))));
    EXPECT_THAT(Products(codes, 1, {9}, false), ElementsAre(Shape("fixed_products", 3, 128, 4 * 1 * 64 * 4)));
    EXPECT_THAT(Products(codes, 5, {9}, false), ElementsAre(Shape("fixed_products", 6, 128, 4 * 4 * 64 * 4)));
  }
}

TEST_F(LaunchShapesTest, ProductsOfOneKindAreOneLaunchUpToEight) {
  const MatrixView floats = {DType::kFloat32, 1, 1};
  EXPECT_THAT(Products(floats, 1, {1, 2, 3, 4, 5, 6, 7, 8}, true), ElementsAre(Shape("products", 12, 128, 0)));
  EXPECT_THAT(Products(floats, 1, {1, 2, 3, 4, 5, 6, 7, 8, 9}, true),
              ElementsAre(Shape("products", 12, 128, 0), Shape("products", 3, 128, 0)));
}

TEST_F(LaunchShapesTest, RowsHaveAThreadForFourChannels) {
  for (const auto& [width, threads] : std::vector<std::pair<int64_t, uint32_t>>{
           {1, 32}, {128, 32}, {129, 64}, {1020, 256}, {1024, 256}, {1028, 256}, {4096, 256}}) {
    LayerNormArgs norm;
    norm.rows = 3;
    norm.width = width;
    EXPECT_EQ(kEmulatedKernels.layer_norm(norm, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("layer_norm", 3, threads, 64)));
    Weight weight;
    weight.matrix = {DType::kFloat32, 5, width};
    EmbedArgs embed;
    embed.rows = 3;
    embed.embedding = &weight;
    EXPECT_EQ(kEmulatedKernels.embed(embed, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("embed", 3, threads, 64)));
  }
  EXPECT_EQ(kEmulatedKernels.deep_embed({3, 32, memory_, memory_, memory_}, nullptr), 0);
  EXPECT_THAT(Take(), ElementsAre(Shape("deep_embed", 3, 32, 0)));
}

TEST_F(LaunchShapesTest, AttentionHasABlockOfARowAndThenOfASequence) {
  const StepRows step = {7, 5, spans_};
  DeepEmbedAttentionArgs args;
  args.step = &step;
  Weight k2, v2;
  args.k2 = &k2;
  args.v2 = &v2;
  // Queries, width, threads, channels that there is room for.
  for (const auto& [queries, width, threads, channels] :
       std::vector<std::tuple<int64_t, int64_t, uint32_t, uint32_t>>{{1, 32, 32, 512},
                                                                     {33, 32, 64, 512},
                                                                     {256, 256, 256, 512},
                                                                     {256, 257, 256, 1024},
                                                                     {256, 768, 256, 1024},
                                                                     {256, 769, 256, 2048},
                                                                     {1024, 1024, 256, 2048},
                                                                     {1024, 1025, 256, 4032},
                                                                     {1984, 2048, 256, 4032}}) {
    k2.matrix = {DType::kFloat16, queries, 32};
    v2.matrix = {DType::kFloat16, width, 32};
    EXPECT_EQ(kEmulatedKernels.deep_embed_attention(args, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("attention", 7, threads, (3 * channels + 5 * 8) * 4),
                                    Shape("attention_state", 5, threads, 0)))
        << queries << " + " << width;
  }
}

TEST_F(LaunchShapesTest, ADrawHasABlockAndCastStatesAThreadForANumber) {
  SampleArgs sample;
  sample.count = 3;
  sample.vocab = 9;
  EXPECT_EQ(kEmulatedKernels.sample(sample, nullptr), 0);
  EXPECT_THAT(Take(), ElementsAre(Shape("sample", 3, 512, (512 + 2048 + 64) * 8)));
  for (const auto& [count, blocks] : std::vector<std::pair<int64_t, uint32_t>>{{1, 1}, {256, 1}, {257, 2}}) {
    EXPECT_EQ(kEmulatedKernels.cast_state({count, true, memory_, nullptr}, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("cast_state", blocks, 256, 0))) << count;
  }
}

// A state that a longer span leaves is written by a launch of its own.
TEST_F(LaunchShapesTest, MixInputHasASecondLaunchOnlyForLongSpans) {
  StepRows step = {7, 5, spans_};
  MixInputArgs args;
  args.step = &step;
  args.width = 130;
  EXPECT_EQ(kEmulatedKernels.mix_input(args, nullptr), 0);
  EXPECT_THAT(Take(), ElementsAre(Shape("mix_input", 7, 64, 128), Shape("mix_state", 5, 64, 64)));
  args.keep_state = true;
  EXPECT_EQ(kEmulatedKernels.mix_input(args, nullptr), 0);
  EXPECT_THAT(Take(), ElementsAre(Shape("mix_input", 7, 64, 128)));
  step = {3, 3, spans_};
  args.keep_state = false;
  EXPECT_EQ(kEmulatedKernels.mix_input(args, nullptr), 0);
  EXPECT_THAT(Take(), ElementsAre(Shape("mix_input", 3, 64, 128)));
}

// Its error comes back, and nothing is launched behind it.
TEST_F(LaunchShapesTest, ALaunchThatFailsIsTheLast) {
  const auto expect_launches = [](int count, const auto& launch) {
    for (fails_at_ = 1; fails_at_ <= count; ++fails_at_) {
      EXPECT_EQ(launch(), 719) << "launch " << fails_at_ << " of " << count;
      EXPECT_EQ(Take().size(), static_cast<size_t>(fails_at_));
    }
    EXPECT_EQ(launch(), 0);
    EXPECT_EQ(Take().size(), static_cast<size_t>(count));
  };
  const StepRows step = {7, 5, spans_};
  MixInputArgs mix;
  mix.step = &step;
  mix.width = 64;
  expect_launches(2, [&] { return kEmulatedKernels.mix_input(mix, nullptr); });
  Weight floats, halves;
  floats.matrix = {DType::kFloat32, 64, 64};
  halves.matrix = {DType::kFloat16, 64, 64};
  DeepEmbedAttentionArgs attention;
  attention.step = &step;
  attention.k2 = attention.v2 = &floats;
  expect_launches(2, [&] { return kEmulatedKernels.deep_embed_attention(attention, nullptr); });
  // Eight of the first kind, one that is left over, and one of another kind.
  std::vector<Product> products(10);
  for (size_t i = 0; i < products.size(); ++i) {
    products[i].weight = i < 9 ? &floats : &halves;
    products[i].x = memory_;
  }
  const ProductsArgs args = {3, products.data(), static_cast<int64_t>(products.size())};
  expect_launches(3, [&] { return kEmulatedKernels.products(args, nullptr); });
  expect_launches(3, [&] { return kEmulatedKernels.tensor_products(args, nullptr); });
  expect_launches(3, [&] { return kEmulatedKernels.rounded_products(args, nullptr); });
}

TEST_F(LaunchShapesTest, HeadsHaveABlockOfASequence) {
  const StepRows step = {7, 5, spans_};
  Wkv4Args wkv4;
  wkv4.step = &step;
  for (const auto& [width, blocks] : std::vector<std::pair<int64_t, uint32_t>>{{63, 1}, {64, 1}, {65, 2}, {129, 3}}) {
    wkv4.width = width;
    EXPECT_EQ(kEmulatedKernels.wkv4(wkv4, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("wkv4", 5 * blocks, 64, 0))) << width;
  }
  // Channels, threads, and the quads of channels that a thread keeps.
  for (const auto& [n, threads, quads] : std::vector<std::tuple<int64_t, uint32_t, uint32_t>>{{1, 32, 1},
                                                                                              {16, 64, 1},
                                                                                              {17, 96, 2},
                                                                                              {32, 128, 2},
                                                                                              {33, 160, 4},
                                                                                              {64, 256, 4},
                                                                                              {65, 288, 8},
                                                                                              {128, 512, 8}}) {
    const uint32_t vector = 16 * quads * 4;
    const uint32_t sums = quads * 2 * 4;
    const auto rounded = [](uint32_t bytes) { return (bytes + 15) / 16 * 16; };
    Wkv6Args wkv6;
    wkv6.step = &step;
    wkv6.heads = 3;
    wkv6.head_size = n;
    EXPECT_EQ(kEmulatedKernels.wkv6(wkv6, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("wkv6", 15, threads, rounded(4 * vector + 3 * sums)))) << n;
    Wkv7Args wkv7;
    wkv7.step = &step;
    wkv7.heads = 3;
    wkv7.head_size = n;
    EXPECT_EQ(kEmulatedKernels.wkv7(wkv7, nullptr), 0);
    EXPECT_THAT(Take(), ElementsAre(Shape("wkv7", 15, threads, rounded(6 * vector + 4 * sums)))) << n;
  }
}

}  // namespace
}  // namespace rwkv::kernels::cuda
