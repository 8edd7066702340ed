// States that are stored in fp16: a step has the bits of the same tokens one by one, in fp32, with the state rounded by
// the host after each.
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kTokens = 5;

class HalfStatesTest : public ::testing::TestWithParam<int64_t> {
 protected:
  float* Floats(int64_t count, float low, float high) {
    memory_.emplace_back(static_cast<size_t>(count + 4));
    float* data = memory_.back().data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
    std::uniform_real_distribution<float> uniform(low, high);
    for (int64_t i = 0; i < count; ++i) data[i] = uniform(random_);
    return data;
  }

  // run(state, row, rows, y): the operation on rows [row, row + rows) of slot 0.
  template <typename RunIt>
  void ExpectRoundedAfterEachToken(const RunIt& run) {
    const int64_t n = GetParam();
    const int64_t size = kHeads * n * n;
    float* const state = Floats(size, -1.0f, 1.0f);
    std::vector<float> store(static_cast<size_t>(size / 2 + 8));
    auto* halves = reinterpret_cast<uint16_t*>(store.data());
    while (reinterpret_cast<uintptr_t>(halves) % 16 != 0) ++halves;
    NarrowFromFloat(DType::kFloat16, state, size, halves);
    float* const got = Floats(kTokens * kHeads * n, 0.0f, 0.0f);
    float* const expected = Floats(kTokens * kHeads * n, 0.0f, 0.0f);
    const std::vector<uint16_t> begin(halves, halves + size);
    WidenToFloat(DType::kFloat16, begin.data(), size, state);

    run(StateTensor{reinterpret_cast<float*>(halves), size, true}, 0, kTokens, got);
    std::vector<uint16_t> rounded(static_cast<size_t>(size));
    for (int64_t token = 0; token < kTokens; ++token) {
      run(StateTensor{state, size}, token, 1, expected + token * kHeads * n);
      NarrowFromFloat(DType::kFloat16, state, size, rounded.data());
      WidenToFloat(DType::kFloat16, rounded.data(), size, state);
    }
    EXPECT_EQ(std::memcmp(got, expected, static_cast<size_t>(kTokens * kHeads * n) * sizeof(float)), 0);
    EXPECT_EQ(std::memcmp(halves, rounded.data(), rounded.size() * sizeof(uint16_t)), 0);
    EXPECT_NE(begin, rounded);
  }

  std::mt19937 random_{7};
  std::deque<std::vector<float>> memory_;
};

TEST_P(HalfStatesTest, Wkv7) {
  const int64_t n = GetParam();
  const int64_t width = kHeads * n;
  Wkv7Args args;
  args.heads = kHeads;
  args.head_size = n;
  for (const float** vector :
       {&args.decay_bias, &args.iclr_bias, &args.k_k, &args.k_a, &args.bonus, &args.ln_weight, &args.ln_bias}) {
    *vector = Floats(width, -1.0f, 1.0f);
  }
  const float* rows[6];
  for (const float*& row : rows) row = Floats(kTokens * width, -1.0f, 1.0f);
  ExpectRoundedAfterEachToken([&](const StateTensor& state, int64_t row, int64_t count, float* y) {
    const SequenceSpan span = {0, 0, count};
    const StepRows step = {count, 1, &span, nullptr};
    args.step = &step;
    args.state = state;
    const float** const inputs[] = {&args.r, &args.k, &args.v, &args.g, &args.decay_lora, &args.iclr_lora};
    for (int i = 0; i < 6; ++i) *inputs[i] = rows[i] + row * width;
    args.y = y;
    EXPECT_EQ(kEmulatedKernels.wkv7(args, nullptr), 0) << emulation::LastStatus();
  });
}

TEST_P(HalfStatesTest, Wkv6) {
  const int64_t n = GetParam();
  const int64_t width = kHeads * n;
  Wkv6Args args;
  args.heads = kHeads;
  args.head_size = n;
  for (const float** vector : {&args.bonus, &args.ln_weight, &args.ln_bias}) *vector = Floats(width, -1.0f, 1.0f);
  const float* const rows[] = {Floats(kTokens * width, -1.0f, 1.0f), Floats(kTokens * width, -1.0f, 1.0f),
                               Floats(kTokens * width, -1.0f, 1.0f), Floats(kTokens * width, 0.5f, 1.0f)};
  ExpectRoundedAfterEachToken([&](const StateTensor& state, int64_t row, int64_t count, float* y) {
    const SequenceSpan span = {0, 0, count};
    const StepRows step = {count, 1, &span, nullptr};
    args.step = &step;
    args.state = state;
    const float** const inputs[] = {&args.r, &args.k, &args.v, &args.w};
    for (int i = 0; i < 4; ++i) *inputs[i] = rows[i] + row * width;
    args.y = y;
    EXPECT_EQ(kEmulatedKernels.wkv6(args, nullptr), 0) << emulation::LastStatus();
  });
}

INSTANTIATE_TEST_SUITE_P(HeadSizes, HalfStatesTest, ::testing::Values(7, 16, 20, 64, 100, 128));

// Numbers of which some round, overflow or are subnormal, and one block more than whole ones.
TEST(CastStateTest, RoundsAsTheHostDoes) {
  std::vector<float> wide;
  for (uint32_t bits = 0; bits < 0x10000; bits += 3) {
    const float exact = HalfToFloat(static_cast<uint16_t>(bits));
    wide.push_back(exact);
    wide.push_back(exact * 1.00048828125f);  // Half a step of some.
    wide.push_back(exact * 1.0003f);
  }
  for (const float value : {65519.99f, 65520.0f, 1e30f, 0x1p-24f, 0x1p-25f, 0x1.000002p-25f, -0.0f}) {
    wide.push_back(value);
  }
  const auto count = static_cast<int64_t>(wide.size());
  std::vector<uint16_t> expected(wide.size());
  NarrowFromFloat(DType::kFloat16, wide.data(), count, expected.data());
  std::vector<uint16_t> narrow(wide.size() + 1, 0xabcd);
  ASSERT_EQ(kEmulatedKernels.cast_state({count, false, wide.data(), narrow.data()}, nullptr), 0);
  EXPECT_EQ(narrow.back(), 0xabcd);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (wide[i] != wide[i]) continue;  // NaN stays one, with other bits perhaps.
    ASSERT_EQ(narrow[i], expected[i]) << wide[i];
  }
  std::vector<float> again(wide.size());
  ASSERT_EQ(kEmulatedKernels.cast_state({count, true, again.data(), narrow.data()}, nullptr), 0);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (wide[i] == wide[i]) ASSERT_EQ(again[i], HalfToFloat(expected[i])) << wide[i];
  }
}

}  // namespace
}  // namespace rwkv::kernels::cuda
