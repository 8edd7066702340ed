// The laws of the step logic, bit for bit, on every device this machine has, one that hides its memory and one that is
// late.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/testing/small_model.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::checkpoint::ModelVersion;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// On devices by name, for every version.
class LawTest : public ::testing::TestWithParam<std::tuple<std::string, ModelVersion>> {
 protected:
  LawTest() : path_(WriteSmallModel(version())) {
    options_.slots = 40;
    options_.max_batch_tokens = 200;
    options_.device = std::get<0>(GetParam());
  }

  ModelVersion version() const { return std::get<1>(GetParam()); }

  const std::string path_;
  TestEngineOptions options_;
  const std::vector<uint32_t> tokens_ = SomeTokens(37, 1);
};

TEST_P(LawTest, PrefillEqualsDecodesAndEverySplit) {
  EnginePipeline pipeline(path_, 1, options_);
  ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
  const std::string whole = FeedInChunks(pipeline, 0, 1, 0, tokens_, tokens_.size());
  ASSERT_EQ(whole.size(), tokens_.size() * kSmallVocabulary * sizeof(float));
  const auto state = pipeline.CopyState(0, 1, tokens_.size());
  ASSERT_THAT(state, IsOk());

  ASSERT_THAT(pipeline.AttachFresh(1, 2), IsOk());
  EXPECT_EQ(FeedInChunks(pipeline, 1, 2, 0, tokens_, 1), whole) << "decodes";
  EXPECT_EQ(*pipeline.CopyState(1, 2, tokens_.size()), *state);
  uint64_t sequence = 3;
  for (size_t split = 1; split < tokens_.size(); ++split, ++sequence) {
    ASSERT_THAT(pipeline.AttachFresh(2, sequence), IsOk());
    const std::vector<uint32_t> head(tokens_.begin(), tokens_.begin() + split);
    const std::vector<uint32_t> tail(tokens_.begin() + split, tokens_.end());
    const std::string parts = FeedInChunks(pipeline, 2, sequence, 0, head, head.size()) +
                              FeedInChunks(pipeline, 2, sequence, split, tail, tail.size());
    EXPECT_EQ(parts, whole) << "split at " << split;
    EXPECT_EQ(*pipeline.CopyState(2, sequence, tokens_.size()), *state) << "split at " << split;
  }
}

TEST_P(LawTest, AnyNumberOfStagesGivesTheSameBits) {
  std::string logits;
  std::vector<std::string> state;
  for (int stages = 1; stages <= 4; ++stages) {
    EnginePipeline pipeline(path_, stages, options_);
    ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
    const std::string got = FeedInChunks(pipeline, 0, 1, 0, tokens_, 7);
    const auto records = pipeline.CopyState(0, 1, tokens_.size());
    ASSERT_THAT(records, IsOk());
    if (stages == 1) {
      logits = got;
      state = *records;
    }
    EXPECT_EQ(got, logits) << stages;
    EXPECT_EQ(*records, state) << stages;
  }
}

TEST_P(LawTest, SaveRestoreGoOnEqualsNeverStopped) {
  EnginePipeline pipeline(path_, 2, options_);
  ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
  const std::string whole = FeedInChunks(pipeline, 0, 1, 0, tokens_, 8);
  for (size_t stop : {1u, 13u, 36u}) {
    SCOPED_TRACE(stop);
    const std::vector<uint32_t> head(tokens_.begin(), tokens_.begin() + stop);
    const std::vector<uint32_t> tail(tokens_.begin() + stop, tokens_.end());
    ASSERT_THAT(pipeline.AttachFresh(1, 100 + stop), IsOk());
    std::string parts = FeedInChunks(pipeline, 1, 100 + stop, 0, head, head.size());
    const auto records = pipeline.CopyState(1, 100 + stop, stop);
    ASSERT_THAT(records, IsOk());
    // Another process, another split of the layers, another slot that was in use.
    EnginePipeline other(path_, 3, options_);
    ASSERT_THAT(other.AttachFresh(7, 9), IsOk());
    ASSERT_THAT(other.Feed(7, 9, 0, {3, 2, 1}), IsOk());
    ASSERT_THAT(other.Restore(7, 50, stop, *records), IsOk());
    parts += FeedInChunks(other, 7, 50, stop, tail, 5);
    EXPECT_EQ(parts, whole);
  }
}

TEST_P(LawTest, AloneEqualsBeside31OthersInAnyOrderOfSlots) {
  EnginePipeline alone(path_, 1, options_);
  ASSERT_THAT(alone.AttachFresh(0, 1), IsOk());
  const std::string expected = FeedInChunks(alone, 0, 1, 0, tokens_, tokens_.size());

  for (int order = 0; order < 3; ++order) {
    SCOPED_TRACE(order);
    EnginePipeline pipeline(path_, 2, options_);
    // Slot of sequence i, the subject being number 5: ascending, descending, scattered.
    const auto slot_of = [order](int i) { return order == 0 ? i : order == 1 ? 39 - i : (i * 7 + 3) % 40; };
    std::vector<std::vector<uint32_t>> others;
    std::vector<uint64_t> positions(32, 0);
    for (int i = 0; i < 32; ++i) {
      ASSERT_THAT(pipeline.AttachFresh(slot_of(i), i), IsOk());
      others.push_back(SomeTokens(200, 1000 + i));
    }
    std::string logits;
    for (int round = 0; positions[5] < tokens_.size(); ++round) {
      v1::Step step;
      for (int at = 0; at < 32; ++at) {
        const int i = (at + round * 5) % 32;  // The rows' order changes, too.
        size_t count = 1 + (i + round) % 5;
        if (i == 5) count = std::min(count, tokens_.size() - positions[5]);
        const std::vector<uint32_t>& source = i == 5 ? tokens_ : others[i];
        const auto begin = source.begin() + positions[i];
        *step.add_entries() =
            Entry(slot_of(i), i, positions[i], {begin, begin + count}, i == 5 || i % 4 == 0, i % 3 == 0);
        positions[i] += count;
      }
      const absl::StatusOr<StepOutput> output = pipeline.Step(step);
      ASSERT_THAT(output, IsOk());
      for (const v1::EntryResult& result : output->result.entries()) ASSERT_THAT(StatusOf(result), IsOk());
      logits += LogitsOf(*output, 5);
    }
    EXPECT_EQ(logits, expected);
  }
}

// What an embedding is made of after `tokens`, fed in chunks: the sum, the last hidden state, the matrix state.
std::vector<std::string> EmbedInChunks(EnginePipeline& pipeline, int slot, uint64_t sequence,
                                       const std::vector<uint32_t>& tokens, size_t chunk, bool matrix,
                                       bool company = false) {
  EXPECT_THAT(pipeline.AttachFresh(slot, sequence), IsOk());
  if (company) EXPECT_THAT(pipeline.AttachFresh(slot + 1, sequence + 1), IsOk());
  v1::EntryResult last;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const size_t end = std::min(begin + chunk, tokens.size());
    v1::Step step;
    if (company) {
      *step.add_entries() = Entry(slot + 1, sequence + 1, begin, {tokens.rbegin(), tokens.rbegin() + end - begin});
    }
    v1::StepEntry& entry = *step.add_entries();
    entry = Entry(slot, sequence, begin, {tokens.begin() + begin, tokens.begin() + end}, company);
    entry.set_hidden_sum(true);
    entry.set_hidden_last(true);
    entry.set_wkv_state(matrix);
    const absl::StatusOr<StepOutput> output = pipeline.Step(step);
    EXPECT_THAT(output, IsOk());
    if (!output.ok()) return {};
    last = *output->result.entries().rbegin();
    EXPECT_THAT(StatusOf(last), IsOk());
  }
  return {last.hidden_sum(), last.hidden_last(), last.wkv_state()};
}

TEST_P(LawTest, EmbeddingsDependOnTheTokensAlone) {
  const bool matrix = version() != ModelVersion::k4;
  EnginePipeline pipeline(path_, 1, options_);
  const std::vector<std::string> whole = EmbedInChunks(pipeline, 0, 1, tokens_, tokens_.size(), matrix);
  ASSERT_THAT(whole, ElementsAre(SizeIs(40 * sizeof(float)), SizeIs(40 * sizeof(float)),
                                 SizeIs(matrix ? 2 * 20 * 20 * sizeof(float) : 0)));
  for (const size_t chunk : {1, 5, 36})
    EXPECT_EQ(EmbedInChunks(pipeline, 2, 3, tokens_, chunk, matrix), whole) << chunk;
  EXPECT_EQ(EmbedInChunks(pipeline, 4, 5, tokens_, 7, matrix, true), whole) << "in company";
  EnginePipeline three(path_, 3, options_);
  EXPECT_EQ(EmbedInChunks(three, 0, 1, tokens_, tokens_.size(), matrix), whole) << "three stages";

  // The sum is that of the hidden states after each token, in order; the state is that of a snapshot.
  ASSERT_THAT(pipeline.AttachFresh(0, 7), IsOk());
  std::vector<float> sum(40, 0.0f);
  for (size_t t = 0; t < tokens_.size(); ++t) {
    v1::Step step;
    *step.add_entries() = Entry(0, 7, t, {tokens_[t]}, false);
    step.mutable_entries(0)->set_hidden_last(true);
    const absl::StatusOr<StepOutput> output = pipeline.Step(step);
    ASSERT_THAT(output, IsOk());
    const std::string& hidden = output->result.entries(0).hidden_last();
    ASSERT_EQ(hidden.size(), sum.size() * sizeof(float));
    EXPECT_EQ(output->result.entries(0).hidden_sum(), "");
    for (size_t c = 0; c < sum.size(); ++c) {
      float value;
      std::memcpy(&value, hidden.data() + c * sizeof(value), sizeof(value));
      sum[c] += value;
    }
  }
  EXPECT_EQ(std::memcmp(sum.data(), whole[0].data(), whole[0].size()), 0);
  const auto records = pipeline.CopyState(0, 7, tokens_.size());
  ASSERT_THAT(records, IsOk());
  EXPECT_THAT(records->back(), HasSubstr(whole[2]));

  v1::Step step;
  *step.add_entries() = Entry(0, 7, tokens_.size(), {1}, false);
  step.mutable_entries(0)->set_wkv_state(true);
  const absl::StatusOr<StepOutput> output = pipeline.Step(step);
  ASSERT_THAT(output, IsOk());
  EXPECT_THAT(StatusOf(output->result.entries(0)),
              StatusIs(matrix ? absl::StatusCode::kOk : absl::StatusCode::kFailedPrecondition));
}

TEST_P(LawTest, APoisonedEntryDisturbsNoOther) {
  // Token 9's embedding overflows the layer norm; everything of a sequence that reads it becomes NaN.
  absl::StatusOr<std::vector<rwkv::testing::RawTensor>> tensors = rwkv::testing::MakeRandomModel([this] {
    rwkv::testing::RandomModelOptions options = SmallModel(version());
    options.dtype = kernels::DType::kFloat32;
    return options;
  }());
  ASSERT_THAT(tensors, IsOk());
  bool found = false;
  for (rwkv::testing::RawTensor& tensor : *tensors) {
    if (tensor.spec.name != "emb.weight") continue;
    found = true;
    const std::vector<float> huge(40, std::numeric_limits<float>::max());
    std::memcpy(&tensor.data[9 * 40 * sizeof(float)], huge.data(), huge.size() * sizeof(float));
  }
  ASSERT_TRUE(found);
  const std::string path = TempPath("poison.safetensors");
  std::ofstream(path, std::ios::binary) << rwkv::testing::SafetensorsBytes(*tensors);

  EnginePipeline pipeline(path, 2, options_);
  ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
  const absl::StatusOr<StepOutput> alone = pipeline.Feed(0, 1, 0, {1, 2, 3});
  ASSERT_THAT(alone, IsOk());
  for (int slot = 1; slot < 4; ++slot) ASSERT_THAT(pipeline.AttachFresh(slot, 10 + slot), IsOk());
  v1::Step step;
  *step.add_entries() = Entry(1, 11, 0, {1, 2, 3}, true, true);
  *step.add_entries() = Entry(2, 12, 0, {1, 9, 3}, true, true);
  *step.add_entries() = Entry(3, 13, 0, {1, 2, 3}, true, true);
  const absl::StatusOr<StepOutput> output = pipeline.Step(step);
  ASSERT_THAT(output, IsOk());
  EXPECT_EQ(LogitsOf(*output, 11), LogitsOf(*alone, 1));
  EXPECT_EQ(LogitsOf(*output, 13), LogitsOf(*alone, 1));
  EXPECT_EQ(LogitsOf(*output, 12), "");
  EXPECT_THAT(StatusOf(output->result.entries(0)), IsOk());
  EXPECT_THAT(StatusOf(output->result.entries(1)), StatusIs(absl::StatusCode::kInternal, HasSubstr("slot 2")));
  EXPECT_FALSE(output->result.entries(1).has_token_id());
  EXPECT_THAT(StatusOf(output->result.entries(2)), IsOk());
  EXPECT_THAT(output->refused_here, ElementsAre(RefusalCause::kNumeric));
  // Such a state is not stored, and the slot is as good as new for the next sequence.
  EXPECT_THAT(pipeline.CopyState(2, 12, 3).status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("not finite")));
  ASSERT_THAT(pipeline.AttachFresh(2, 14), IsOk());
  const absl::StatusOr<StepOutput> after = pipeline.Feed(2, 14, 0, {1, 2, 3});
  ASSERT_THAT(after, IsOk());
  EXPECT_EQ(LogitsOf(*after, 14), LogitsOf(*alone, 1));
}

std::string LawName(const ::testing::TestParamInfo<std::tuple<std::string, ModelVersion>>& info) {
  std::string name = absl::StrCat(std::get<0>(info.param), "_rwkv", checkpoint::Name(std::get<1>(info.param)));
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

std::vector<std::string> DevicesOfThisMachine() {
  std::vector<std::string> devices = kernels::AvailableDevices();
  if (kernels::cuda::HasEmulatedDevice()) devices.emplace_back(kernels::cuda::kEmulatedDevice);
  return devices;
}

std::vector<std::string> DevicesWithHalfStates() {
  std::vector<std::string> devices;
  for (const std::string& device : DevicesOfThisMachine()) {
    if (absl::StartsWith(device, "cuda")) devices.push_back(absl::StrCat(device, "/half"));
  }
  return devices;
}

std::vector<std::string> DevicesThatRound() {
  std::vector<std::string> devices;
  for (const std::string& device : DevicesOfThisMachine()) {
    if (absl::StartsWith(device, "cuda")) devices.push_back(absl::StrCat(device, "/rounded"));
  }
  return devices;
}

// One version on every device, and every version on the best of them: kernels/conformance holds each operation to the
// same laws on each device.
INSTANTIATE_TEST_SUITE_P(Devices, LawTest,
                         ::testing::Combine(::testing::ValuesIn(DevicesOfThisMachine()),
                                            ::testing::Values(ModelVersion::k7)),
                         LawName);
// wkv states in fp16 have the laws, too.
INSTANTIATE_TEST_SUITE_P(HalfStates, LawTest,
                         ::testing::Combine(::testing::ValuesIn(DevicesWithHalfStates()),
                                            ::testing::Values(ModelVersion::k5_2, ModelVersion::k6, ModelVersion::k7)),
                         LawName);
// So have products of rounded inputs.
INSTANTIATE_TEST_SUITE_P(RoundedProducts, LawTest,
                         ::testing::Combine(::testing::ValuesIn(DevicesThatRound()),
                                            ::testing::Values(ModelVersion::k7)),
                         LawName);
INSTANTIATE_TEST_SUITE_P(DevicesThatTellTales, LawTest,
                         ::testing::Combine(::testing::Values(kProtectedDevice, kLazyDevice),
                                            ::testing::Values(ModelVersion::k7)),
                         LawName);
INSTANTIATE_TEST_SUITE_P(Versions, LawTest,
                         ::testing::Combine(::testing::Values(kernels::AvailableDevices().back(), kLazyDevice),
                                            ::testing::Values(ModelVersion::k4, ModelVersion::k5_0, ModelVersion::k5_1,
                                                              ModelVersion::k5_2, ModelVersion::k6, ModelVersion::k7a,
                                                              ModelVersion::k7b)),
                         LawName);

}  // namespace
}  // namespace rwkv::worker
