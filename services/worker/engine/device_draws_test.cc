// A GPU (an emulated one) draws what the host's Sampler draws, bit for bit.
#include "services/worker/engine/device_draws.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"
#include "rwkv/v1/common.pb.h"
#include "services/common/sampling/sampling_params.h"
#include "services/worker/engine/slot_table.h"
#include "services/worker/sampler/sampler.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SamplingParams Params(const v1::Sampling& sampling, int64_t vocab_size, const std::vector<uint32_t>& banned = {}) {
  absl::StatusOr<SamplingParams> params = SamplingParams::Create(sampling, vocab_size, banned);
  EXPECT_THAT(params, IsOk());
  return *std::move(params);
}

// GPUs of this machine, and an emulated one.
std::vector<std::string> DrawingDevices() {
  std::vector<std::string> devices;
  for (const std::string& device : kernels::AvailableDevices()) {
    if (absl::StartsWith(device, "cuda:")) devices.push_back(device);
  }
  if (kernels::cuda::HasEmulatedDevice()) devices.emplace_back(kernels::cuda::kEmulatedDevice);
  return devices;
}

class DeviceDrawsTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<kernels::Device>> device = kernels::cuda::IsEmulatedDevice(GetParam())
                                                                  ? kernels::cuda::OpenEmulatedDevice(GetParam())
                                                                  : kernels::OpenDevice(GetParam());
    ASSERT_THAT(device, IsOk());
    device_ = *std::move(device);
    absl::StatusOr<std::unique_ptr<kernels::Stream>> stream = device_->NewStream();
    ASSERT_THAT(stream, IsOk());
    stream_ = *std::move(stream);
    absl::StatusOr<DeviceDraws> draws = DeviceDraws::Create(*device_, kRows);
    ASSERT_THAT(draws, IsOk());
    draws_ = *std::move(draws);
  }
  void TearDown() override {
    stream_.reset();
    EXPECT_THAT(kernels::cuda::ViolationsOfEmulatedDevice(), IsEmpty());
  }

  // All that were added, from these rows.
  void Draw(const std::vector<float>& logits, int64_t vocab) {
    using Floats = kernels::DeviceArray<float>;
    const auto size = static_cast<int64_t>(logits.size());
    absl::StatusOr<Floats> device_logits = Floats::Create(*device_, size);
    absl::StatusOr<Floats> pinned = Floats::Create(*device_, size, kernels::MemoryKind::kPinned);
    absl::StatusOr<Floats> adjusted = Floats::Create(*device_, kRows * vocab);
    ASSERT_THAT(device_logits, IsOk());
    ASSERT_THAT(pinned, IsOk());
    ASSERT_THAT(adjusted, IsOk());
    std::copy(logits.begin(), logits.end(), pinned->data());
    ASSERT_THAT(stream_->Copy(device_logits->data(), pinned->data(), size * 4), IsOk());
    ASSERT_THAT(draws_.Enqueue(device_->ops().sample, vocab, device_logits->data(), adjusted->data(), *stream_),
                IsOk());
    ASSERT_THAT(stream_->Synchronize(), IsOk());
  }

  // What the device and the host say of one row.
  std::pair<absl::Status, absl::Status> Errors(const std::vector<float>& logits, const Turn& turn) {
    draws_.Clear();
    EXPECT_EQ(draws_.Add(turn, 0, 0), 0);
    Draw(logits, static_cast<int64_t>(logits.size()));
    PenaltyState penalties = turn.penalties;
    return {ToSampledToken(draws_.at(0)).status(), sampler_.Sample(logits, turn.sampling, 0, penalties).status()};
  }

  static constexpr int64_t kRows = 4;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::Stream> stream_;
  DeviceDraws draws_;
  Sampler sampler_;
};

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

TEST_P(DeviceDrawsTest, HasTheBitsOfTheSampler) {
  std::mt19937 random(20261130);
  const auto pick = [&](auto... values) {
    const std::vector<float> choices = {static_cast<float>(values)...};
    return choices[random() % choices.size()];
  };
  for (int round = 0; round < 60; ++round) {
    const auto vocab = static_cast<int64_t>(pick(1, 2, 9, 50, 257, 700, 1500));
    std::vector<float> logits(static_cast<size_t>(kRows * vocab));
    std::vector<Turn> turns;
    std::vector<uint64_t> positions;
    draws_.Clear();
    for (int64_t row = 0; row < kRows; ++row) {
      // The rows of logits in another order than the draws.
      const int64_t at = kRows - 1 - row;
      std::normal_distribution<float> normal(0, pick(0.1, 1, 4, 30));
      const bool ties = pick(0, 0, 1) == 1;
      for (int64_t i = 0; i < vocab; ++i) {
        float& logit = logits[static_cast<size_t>(at * vocab + i)];
        logit = ties ? std::round(normal(random)) : normal(random);
        if (i > 0 && random() % 20 == 0) logit = -kInfinity;
      }
      v1::Sampling sampling;
      sampling.set_temperature(pick(0, 0.3, 1, 1, 1.7, 10));
      sampling.set_order(pick(0, 1) == 0 ? v1::SAMPLING_ORDER_TEMPERATURE_FIRST : v1::SAMPLING_ORDER_RWKV_PIP);
      sampling.set_top_k(static_cast<int32_t>(pick(0, 0, 1, 5, 40)));
      sampling.set_top_p(pick(1, 0.01, 0.31, 0.87, 0.999));
      sampling.set_typical_p(pick(1, 1, 0.23, 0.91));
      sampling.set_min_p(pick(0, 0, 0.013, 0.41));
      sampling.set_seed(random());
      sampling.set_top_logprobs(static_cast<uint32_t>(pick(0, 1, 5, 64)));
      std::vector<uint32_t> banned;
      if (pick(0, 1) == 1) {
        sampling.set_presence_penalty(pick(0, 0.4, -1));
        sampling.set_frequency_penalty(pick(0, 0.3));
        sampling.set_repetition_penalty(pick(1, 1.3, 0.7));
        for (int i = 0; i < 3; ++i) {
          (*sampling.mutable_logit_bias())[static_cast<uint32_t>(random() % vocab)] = pick(-2, 0.7, 5);
        }
      }
      if (vocab > 5 && pick(0, 1) == 1) banned = {1, 3, 4, 5};
      Turn turn(Params(sampling, vocab, banned));
      for (int i = 0; i < 12; ++i) turn.penalties.Count(turn.sampling, static_cast<uint32_t>(random() % vocab));
      turns.push_back(std::move(turn));
      positions.push_back(random() % 1000);
      ASSERT_EQ(draws_.Add(turns.back(), positions.back(), at), row);
    }
    Draw(logits, vocab);
    for (int64_t row = 0; row < kRows; ++row) {
      const float* const from = logits.data() + (kRows - 1 - row) * vocab;
      Turn& turn = turns[static_cast<size_t>(row)];
      const std::string where = absl::StrCat("round ", round, " row ", row, " V ", vocab);
      ASSERT_OK_AND_ASSIGN(const SampledToken expected,
                           sampler_.Sample(absl::MakeConstSpan(from, static_cast<size_t>(vocab)), turn.sampling,
                                           positions[static_cast<size_t>(row)], turn.penalties));
      ASSERT_OK_AND_ASSIGN(const SampledToken drawn, ToSampledToken(draws_.at(static_cast<int>(row))));
      ASSERT_EQ(drawn.token, expected.token) << where;
      ASSERT_TRUE(SameBits(drawn.logprob, expected.logprob)) << where << " " << drawn.logprob << expected.logprob;
      ASSERT_EQ(drawn.top_logprobs.size(), expected.top_logprobs.size()) << where;
      for (size_t i = 0; i < drawn.top_logprobs.size(); ++i) {
        ASSERT_EQ(drawn.top_logprobs[i].token, expected.top_logprobs[i].token) << where << " top " << i;
        ASSERT_TRUE(SameBits(drawn.top_logprobs[i].logprob, expected.top_logprobs[i].logprob)) << where << " top " << i;
      }
    }
  }
}

// Ids of three digits, weights that are small, and all keys in one bin.
TEST_P(DeviceDrawsTest, HasTheBitsOfTheSamplerOnLargeRows) {
  constexpr int64_t kVocab = 70000;
  std::mt19937 random(5);
  for (const float spread : {0.0f, 1e-4f, 3.0f, 1000.0f}) {
    std::normal_distribution<float> normal(0, 1);
    std::vector<float> logits(kVocab);
    for (float& logit : logits) logit = spread * normal(random);
    v1::Sampling sampling;
    sampling.set_temperature(0.9f);
    sampling.set_top_p(0.9f);
    sampling.set_typical_p(0.95f);
    sampling.set_seed(random());
    const Turn turn(Params(sampling, kVocab));
    draws_.Clear();
    for (uint64_t position = 0; position < 2; ++position) {
      ASSERT_EQ(draws_.Add(turn, position, 0), static_cast<int>(position));
    }
    Draw(logits, kVocab);
    for (uint64_t position = 0; position < 2; ++position) {
      PenaltyState penalties;
      ASSERT_OK_AND_ASSIGN(const SampledToken expected, sampler_.Sample(logits, turn.sampling, position, penalties));
      ASSERT_OK_AND_ASSIGN(const SampledToken drawn, ToSampledToken(draws_.at(static_cast<int>(position))));
      EXPECT_EQ(drawn.token, expected.token) << spread;
      EXPECT_TRUE(SameBits(drawn.logprob, expected.logprob)) << spread;
    }
  }
}

TEST_P(DeviceDrawsTest, SaysWhyNothingIsDrawn) {
  v1::Sampling sampling;
  const Turn greedy(Params(sampling, 3));
  const auto is = [](const char* words) { return StatusIs(absl::StatusCode::kInternal, HasSubstr(words)); };
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity}) {
    const auto [device, host] = Errors({1, bad, 2}, greedy);
    EXPECT_THAT(device, is("is NaN or +inf"));
    EXPECT_FALSE(host.ok());
  }
  const auto [no_logit, no_logit_on_host] = Errors({-kInfinity, -kInfinity, -kInfinity}, greedy);
  EXPECT_THAT(no_logit, is("every logit is -inf"));
  EXPECT_EQ(no_logit, no_logit_on_host);

  const auto [banned, banned_on_host] = Errors({1, -kInfinity, 2}, Turn(Params(sampling, 3, {0, 1, 2, 3})));
  EXPECT_THAT(banned, is("banned"));
  EXPECT_EQ(banned, banned_on_host);

  sampling.set_repetition_penalty(0.001f);
  Turn out_of_range(Params(sampling, 3));
  out_of_range.penalties.Count(out_of_range.sampling, 1);
  const auto [range, range_on_host] = Errors({1, 3e38f, 2}, out_of_range);
  EXPECT_THAT(range, is("out of range"));
  EXPECT_EQ(range, range_on_host);
}

TEST_P(DeviceDrawsTest, TheLargestNumberIsALogit) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const auto [device, host] = Errors({-kLargest, kLargest, 2}, Turn(Params({}, 3)));
  EXPECT_THAT(device, IsOk());
  EXPECT_THAT(host, IsOk());
  EXPECT_EQ(draws_.at(0).token, 1u);
  EXPECT_THAT(Errors({-kLargest, -kInfinity, -kInfinity}, Turn(Params({}, 3))).first, IsOk());
}

TEST_P(DeviceDrawsTest, HasRoomForSoManyRowsAndEdits) {
  v1::Sampling sampling;
  sampling.set_presence_penalty(1);
  constexpr int64_t kVocab = 65536;
  Turn turn(Params(sampling, kVocab));
  for (uint32_t id = 0; id < DeviceDraws::kMaxEdits / 2 + 1; ++id) turn.penalties.Count(turn.sampling, id);
  EXPECT_EQ(draws_.Add(turn, 0, 0), 0);
  EXPECT_EQ(draws_.Add(turn, 0, 1), -1);
  Turn rest(Params(sampling, kVocab));
  for (uint32_t id = 0; id < DeviceDraws::kMaxEdits / 2; ++id) rest.penalties.Count(rest.sampling, id);
  EXPECT_EQ(draws_.Add(rest, 0, 1), -1) << "one more than there is room for";
  rest.penalties = PenaltyState();
  for (uint32_t id = 0; id < DeviceDraws::kMaxEdits / 2 - 1; ++id) rest.penalties.Count(rest.sampling, id);
  EXPECT_EQ(draws_.Add(rest, 0, 1), 1);
  const Turn greedy(Params({}, kVocab));
  for (int row = 2; row < kRows; ++row) EXPECT_EQ(draws_.Add(greedy, 0, row), row);
  EXPECT_EQ(draws_.Add(greedy, 0, kRows), -1);
  draws_.Clear();
  EXPECT_EQ(draws_.Add(turn, 0, 0), 0);
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DeviceDrawsTest);
INSTANTIATE_TEST_SUITE_P(Devices, DeviceDrawsTest, ::testing::ValuesIn(DrawingDevices()),
                         [](const ::testing::TestParamInfo<std::string>& info) {
                           return absl::StrReplaceAll(info.param, {{"/", "_"}, {":", "_"}});
                         });

}  // namespace
}  // namespace rwkv::worker
