// That the checker sees each wrong line of a kernel and nothing in the right one, and finds nothing in our own kernels.
#include "kernels/cuda/testing/checker.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/mutants.h"

namespace rwkv::kernels::cuda {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<std::string> FindingsIn(Mutant mutant) {
  std::vector<float> x(128, 1.0f);
  std::vector<float> y(160);
  Checker checker;
  checker.Allow(x.data(), 128 * 4);
  checker.Allow(y.data(), 128 * 4);
  EXPECT_EQ(LaunchMutant(mutant, x.data(), y.data()), 0);
  return checker.findings();
}

TEST(CheckerTest, RightKernelHasNoFindings) {
  EXPECT_THAT(FindingsIn(Mutant::kNone), IsEmpty());
  EXPECT_THAT(FindingsIn(Mutant::kAtomic), IsEmpty());
}

TEST(CheckerTest, EveryMutantIsFound) {
#if __has_feature(thread_sanitizer)
  GTEST_SKIP() << "the thread sanitizer's own library hears of the accesses here";
#endif
  EXPECT_THAT(FindingsIn(Mutant::kNoBarrier), Contains(HasSubstr("read before it is written")));
  EXPECT_THAT(FindingsIn(Mutant::kNoBarrier), Contains(HasSubstr("write after read")));
  EXPECT_THAT(FindingsIn(Mutant::kNoLastBarrier), Contains(HasSubstr("write after read")));
  EXPECT_THAT(FindingsIn(Mutant::kNoSyncWarp), Contains(HasSubstr("read")));
  EXPECT_THAT(FindingsIn(Mutant::kTwoBlocks), Contains(HasSubstr("write after write by thread 0 of block 1")));
  EXPECT_THAT(FindingsIn(Mutant::kUnwritten), Contains(HasSubstr("read before it is written")));
  EXPECT_THAT(FindingsIn(Mutant::kStray), Contains(HasSubstr("stray address by thread 63 of block 1")));
  EXPECT_THAT(FindingsIn(Mutant::kEarly), Contains(HasSubstr("access before BeginKernel() by thread 9")));
  EXPECT_THAT(FindingsIn(Mutant::kNoAtomic), Contains(HasSubstr("write after write")));
  EXPECT_THAT(FindingsIn(Mutant::kAtomicRead), Contains(HasSubstr("write after read")));
}

// Memory of a test, all of which the checker allows.
class Memory {
 public:
  explicit Memory(Checker& checker) : checker_(checker) {}
  float* Floats(int64_t count) {
    floats_.emplace_back(static_cast<size_t>(count + 4), 0.25f);
    float* data = floats_.back().data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
    checker_.Allow(data, count * 4);
    return data;
  }

 private:
  Checker& checker_;
  std::vector<std::vector<float>> floats_;
};

// The smallest shapes with two blocks, several rows, one of nobody and a ragged end.
class OurKernelsTest : public ::testing::Test {
 protected:
  OurKernelsTest() {
    checker_.Allow(spans_, sizeof(spans_));
    step_.rows = 5;
    step_.span_count = 3;
    step_.spans = spans_;
  }

  Checker checker_;
  Memory memory_{checker_};
  SequenceSpan spans_[3] = {{1, 0, 3}, {kPaddingSlot, 3, 1}, {0, 4, 1}};
  StepRows step_;
};

TEST_F(OurKernelsTest, MixInput) {
  for (const int64_t width : {130, 264}) {
    MixInputArgs args;
    args.step = &step_;
    args.width = width;
    args.x = memory_.Floats(5 * width);
    args.weight = memory_.Floats(width);
    args.bias = memory_.Floats(width);
    args.shift = {memory_.Floats(2 * width), width};
    args.outputs = 2;
    for (int m = 0; m < 2; ++m) {
      args.mix[m] = memory_.Floats(width);
      args.y[m] = memory_.Floats(5 * width);
    }
    EXPECT_EQ(kCheckedKernels.mix_input(args, {nullptr, true}), 0);
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, Wkv7) {
  for (const int64_t n : {17, 64}) {
    Wkv7Args args;
    args.step = &step_;
    args.heads = 2;
    args.head_size = n;
    args.state = {memory_.Floats(2 * 2 * n * n), 2 * n * n};
    for (const float** vector :
         {&args.decay_bias, &args.iclr_bias, &args.k_k, &args.k_a, &args.bonus, &args.ln_weight, &args.ln_bias}) {
      *vector = memory_.Floats(2 * n);
    }
    for (const float** rows : {&args.r, &args.k, &args.v, &args.g, &args.decay_lora, &args.iclr_lora}) {
      *rows = memory_.Floats(5 * 2 * n);
    }
    args.y = memory_.Floats(5 * 2 * n);
    for (const bool is_half : {false, true}) {
      args.state.is_half = is_half;
      EXPECT_EQ(kCheckedKernels.wkv7(args, {nullptr, true}), 0);
    }
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, Wkv4) {
  Wkv4Args args;
  args.step = &step_;
  args.width = 130;
  for (StateTensor* state : {&args.aa, &args.bb, &args.pp}) *state = {memory_.Floats(2 * 130), 130};
  for (const float** vector : {&args.decay, &args.bonus}) *vector = memory_.Floats(130);
  for (const float** rows : {&args.r, &args.k, &args.v}) *rows = memory_.Floats(5 * 130);
  args.y = memory_.Floats(5 * 130);
  EXPECT_EQ(kCheckedKernels.wkv4(args, {nullptr, true}), 0);
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, LayerNorm) {
  for (const int64_t width : {7, 130, 264, 1100}) {
    LayerNormArgs args;
    args.rows = 2;
    args.width = width;
    args.x = memory_.Floats(2 * width);
    args.weight = memory_.Floats(width);
    args.bias = memory_.Floats(width);
    args.y = memory_.Floats(2 * width);
    EXPECT_EQ(kCheckedKernels.layer_norm(args, {nullptr, true}), 0);
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, Embed) {
  const int32_t tokens[] = {2, 0};
  checker_.Allow(tokens, sizeof(tokens));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t width : {21, 160}) {
      Weight weight;
      const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
      weight.matrix = {dtype, 3, width, memory_.Floats(3 * ((width * bytes + 31) / 32 * 32) / 4)};
      EmbedArgs args;
      args.rows = 2;
      args.tokens = tokens;
      args.embedding = &weight;
      args.weight = memory_.Floats(width);
      args.bias = memory_.Floats(width);
      args.x = memory_.Floats(2 * width);
      EXPECT_EQ(kCheckedKernels.embed(args, {nullptr, true}), 0);
    }
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, DeepEmbed) {
  const int64_t n = 40;
  EXPECT_EQ(kCheckedKernels.deep_embed({3, n, memory_.Floats(3 * n * n), memory_.Floats(3 * n), memory_.Floats(3 * n)},
                                       nullptr),
            0);
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, DeepEmbedAttention) {
  const int32_t tokens[] = {2, 0, 1, 2, 2};
  checker_.Allow(tokens, sizeof(tokens));
  step_.tokens = tokens;
  const int64_t queries = 212, width = 300, rank = 34, capacity = 6;           // All channels of the smallest kernel.
  const std::vector<uint16_t> scales(static_cast<size_t>(width * 2), 0x3c00);  // one
  checker_.Allow(scales.data(), width * 2 * 2);
  for (const Quantization quantization : {Quantization::kNone, Quantization::kInt8, Quantization::kInt4}) {
    Weight k2, v2;
    for (Weight* weight : {&k2, &v2}) {
      const int64_t rows = weight == &k2 ? queries : width;
      weight->matrix = {DType::kFloat16, rows, rank, memory_.Floats(rows * 96 / 4)};
      weight->matrix.quantization = quantization;
      if (quantization == Quantization::kNone) continue;
      weight->matrix.group = 32;
      weight->matrix.scales = scales.data();
      if (quantization == Quantization::kInt4) weight->matrix.minimums = scales.data();
    }
    DeepEmbedAttentionArgs args;
    args.step = &step_;
    args.vocabulary = 3;
    args.capacity = capacity;
    args.length = {memory_.Floats(2), 1};
    args.token_cache = {memory_.Floats(2 * capacity), capacity};
    args.key_cache = {memory_.Floats(2 * capacity * rank), capacity * rank};
    args.value_cache = {memory_.Floats(2 * capacity * rank), capacity * rank};
    args.q_previous = {memory_.Floats(2 * queries), queries};
    for (int slot : {0, 1}) {
      *args.length.of(slot) = 2.0f;
      for (int t = 0; t < 2; ++t) args.token_cache.of(slot)[t] = static_cast<float>(t);
    }
    args.k2 = &k2;
    args.v2 = &v2;
    args.k_emb = memory_.Floats(3 * queries);
    args.v_emb = memory_.Floats(3 * width);
    for (const float** vector :
         {&args.x_q, &args.x_k, &args.lnq_weight, &args.lnq_bias, &args.lnk_weight, &args.lnk_bias}) {
      *vector = memory_.Floats(queries);
    }
    for (const float** vector : {&args.x_v, &args.lnv_weight, &args.lnv_bias}) *vector = memory_.Floats(width);
    args.q = memory_.Floats(5 * queries);
    args.key = memory_.Floats(5 * rank);
    args.value = memory_.Floats(5 * rank);
    args.y = memory_.Floats(5 * width);
    EXPECT_EQ(kCheckedKernels.deep_embed_attention(args, {nullptr, true}), 0);
    EXPECT_EQ(*args.length.of(1), 5.0f);
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, Wkv6) {
  for (const int64_t n : {17, 64}) {
    Wkv6Args args;
    args.step = &step_;
    args.heads = 2;
    args.head_size = n;
    args.state = {memory_.Floats(2 * 2 * n * n), 2 * n * n};
    for (const float** vector : {&args.bonus, &args.ln_weight, &args.ln_bias}) *vector = memory_.Floats(2 * n);
    for (const float** rows : {&args.r, &args.w, &args.k, &args.v, &args.gate}) *rows = memory_.Floats(5 * 2 * n);
    args.y = memory_.Floats(5 * 2 * n);
    EXPECT_EQ(kCheckedKernels.wkv6(args, {nullptr, true}), 0);
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

TEST_F(OurKernelsTest, Products) {
  for (const int64_t inputs : {264, 70}) {
    for (const int64_t rows : {1, 3, 9}) {
      Weight weight;
      const int64_t pitch = (inputs * 4 + 31) / 32 * 32;
      weight.matrix = {DType::kFloat32, 19, inputs, memory_.Floats(19 * pitch / 4)};
      Product product;
      product.weight = &weight;
      product.x = memory_.Floats(rows * inputs);
      product.bias = memory_.Floats(19);
      product.gate = memory_.Floats(rows * 19);
      product.accumulate = true;
      product.activation = Activation::kTanh;
      product.y = memory_.Floats(rows * 19);
      EXPECT_EQ(kCheckedKernels.products({rows, &product, 1}, {nullptr, true}), 0);
    }
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

// Two blocks of outputs; one tile of rows, two, and several of the large kind.
TEST_F(OurKernelsTest, TensorProducts) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t inputs : {296, 70}) {
      for (const int64_t rows : {3, 11, 35}) {
        Weight weight;
        const int64_t pitch = (inputs * 2 + 31) / 32 * 32;
        weight.matrix = {dtype, 37, inputs, memory_.Floats(37 * pitch / 4)};
        Product product;
        product.weight = &weight;
        product.x = memory_.Floats(rows * inputs);
        product.accumulate = true;
        product.y = memory_.Floats(rows * 37);
        EXPECT_EQ(kCheckedKernels.tensor_products({rows, &product, 1}, {nullptr, true}), 0);
        EXPECT_EQ(kCheckedKernels.rounded_products({rows, &product, 1}, {nullptr, true}), 0);
      }
    }
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

// What goes before and behind a product of another library: two blocks each, ragged rows and ends.
TEST_F(OurKernelsTest, AroundALibrarysProduct) {
  for (const int64_t inputs : {296, 70}) {
    Weight weight;
    weight.matrix = {DType::kBFloat16, 67, inputs, nullptr};
    Product product;
    product.weight = &weight;
    product.x = memory_.Floats(5 * inputs);
    product.bias = memory_.Floats(67);
    product.gate = memory_.Floats(5 * 67);
    product.accumulate = true;
    product.y = memory_.Floats(5 * 67);
    RoundInputsArgs round;
    round.x = product.x;
    round.rows = 5;
    round.inputs = inputs;
    round.to_rows = 16;
    round.pitch = (inputs + 15) / 16 * 16;
    round.to = reinterpret_cast<uint16_t*>(memory_.Floats(round.to_rows * round.pitch / 2));
    EXPECT_EQ(kCheckedKernels.round_inputs(round, {nullptr, true}), 0);
    EXPECT_EQ(kCheckedKernels.finish_product({&product, 5, memory_.Floats(5 * 68), 68}, {nullptr, true}), 0);
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

// With and without tensor cores: one tile of rows of each size, several passes, two blocks of outputs.
TEST_F(OurKernelsTest, FixedPointProducts) {
  const int64_t outputs = 67;
  for (const Quantization quantization : {Quantization::kInt8, Quantization::kInt4}) {
    for (const int64_t group : {32, 64}) {
      for (const int64_t inputs : {128, 130, 1096}) {
        const int64_t groups = (inputs + group - 1) / group;
        const std::vector<uint16_t> scales(static_cast<size_t>(outputs * groups), 0x3c00);  // one
        checker_.Allow(scales.data(), outputs * groups * 2);
        const int64_t row_bytes = quantization == Quantization::kInt8 ? inputs : inputs / 2;
        Weight weight;
        weight.matrix = {DType::kFloat16, outputs, inputs, memory_.Floats(outputs * ((row_bytes + 31) / 32 * 32) / 4)};
        weight.matrix.quantization = quantization;
        weight.matrix.group = group;
        weight.matrix.scales = scales.data();
        if (group == 32) weight.matrix.minimums = scales.data();
        for (const int64_t rows : {1, 6, 9, 17}) {
          if (rows > 9 && inputs != 130) continue;
          Product product;
          product.weight = &weight;
          product.x = memory_.Floats(rows * inputs);
          product.y = memory_.Floats(rows * outputs);
          EXPECT_EQ(kCheckedKernels.tensor_products({rows, &product, 1}, {nullptr, true}), 0);
          if (rows == 1 || (rows == 6 && inputs <= 130))
            EXPECT_EQ(kCheckedKernels.products({rows, &product, 1}, {nullptr, true}), 0);
        }
      }
    }
  }
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

// A block and a part of one.
TEST_F(OurKernelsTest, CastState) {
  constexpr int64_t kCount = 300;
  std::vector<uint16_t> narrow(kCount, 0x3c00);  // one
  checker_.Allow(narrow.data(), kCount * 2);
  float* const wide = memory_.Floats(kCount);
  for (const bool widens : {true, false}) {
    EXPECT_EQ(kCheckedKernels.cast_state({kCount, widens, wide, narrow.data()}, {nullptr, true}), 0);
  }
  EXPECT_EQ(wide[kCount - 1], 1.0f);
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

// Every cut, biases, penalties and bans; ids of two digits, some of which are changed by more than one, and of nobody.
TEST_F(OurKernelsTest, Sample) {
  constexpr uint32_t kVocab = 600;
  SampleArgs args;
  args.count = 3;
  args.vocab = kVocab;
  float* const logits = memory_.Floats(3 * kVocab);
  for (int i = 0; i < 3 * kVocab; ++i) logits[i] = static_cast<float>(i * 37 % 101) * 0.1f;
  args.logits = logits;
  args.adjusted = memory_.Floats(3 * kVocab);
  const SampleEdit edits[] = {{5, 0, 1.0}, {590, 0, -2.0},       {kVocab, 0, 1.0}, {590, 0, 0.5},
                              {7, 0, 0.5}, {kVocab + 1, 0, 0.5}, {5, 40, 0.0},     {570, 595, 0.0}};
  SampleRow rows[3];
  SampleResult results[3];
  checker_.Allow(edits, sizeof(edits));
  checker_.Allow(rows, sizeof(rows));
  checker_.Allow(results, sizeof(results));
  for (int r = 1; r < 3; ++r) {
    rows[r] = {r, 0.8f, 0.9f, 0.8f, 0.01f, 300, 1.1f, r == 2, 3, 0x123456789abcdef0u, 0, 3, 6, 8};
  }
  args.rows = rows;
  args.edits = edits;
  args.results = results;
  EXPECT_EQ(kCheckedKernels.sample(args, {nullptr, true}), 0);
  EXPECT_THAT(checker_.findings(), IsEmpty());
}

}  // namespace
}  // namespace rwkv::kernels::cuda
