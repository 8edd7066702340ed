// The laws of the step logic, bit for bit, on every device this machine has, one that hides its memory and one that is
// late; and what bad entries get.
#include "services/worker/engine/stage_engine.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/dispatch/open_device.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/common/grpc_status.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::checkpoint::ModelVersion;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int kVocab = 61;

std::string TempPath(const std::string& name) { return absl::StrCat(std::getenv("TEST_TMPDIR"), "/", name); }

rwkv::testing::RandomModelOptions SmallModel(ModelVersion version = ModelVersion::k7) {
  rwkv::testing::RandomModelOptions options;
  options.version = version;
  options.layers = 4;
  options.width = 40;
  options.head_size = 20;
  options.ffn_width = 72;
  options.vocab_size = kVocab;
  options.mix_rank = 3;
  options.decay_rank = 6;
  options.iclr_rank = 5;
  options.value_residual_rank = 3;
  options.gate_rank = 9;
  return options;
}

std::string WriteSmallModel(ModelVersion version = ModelVersion::k7) {
  const std::string path = TempPath(absl::StrCat("small-", checkpoint::Name(version), ".safetensors"));
  EXPECT_THAT(rwkv::testing::WriteRandomModel(SmallModel(version), path), IsOk());
  return path;
}

std::vector<uint32_t> SomeTokens(int count, uint32_t seed) {
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    tokens.push_back((seed >> 16) % kVocab);
  }
  return tokens;
}

absl::Status StatusOf(const v1::EntryResult& result) { return common::FromStatusProto(result.status()); }

// Feeds `tokens` in chunks of `chunk` and returns the logits of all, as bytes.
std::string FeedInChunks(EnginePipeline& pipeline, int slot, uint64_t sequence, uint64_t position,
                         const std::vector<uint32_t>& tokens, size_t chunk) {
  std::string logits;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const size_t end = std::min(begin + chunk, tokens.size());
    const absl::StatusOr<StepOutput> output =
        pipeline.Feed(slot, sequence, position + begin, {tokens.begin() + begin, tokens.begin() + end});
    EXPECT_THAT(output, IsOk());
    if (!output.ok()) return "";
    logits += LogitsOf(*output, sequence);
  }
  return logits;
}

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
  ASSERT_EQ(whole.size(), tokens_.size() * kVocab * sizeof(float));
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

// One version on every device, and every version on the best of them: kernels/conformance holds each operation to the
// same laws on each device.
INSTANTIATE_TEST_SUITE_P(Devices, LawTest,
                         ::testing::Combine(::testing::ValuesIn(kernels::AvailableDevices()),
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

class StageEngineTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { path_ = WriteSmallModel(); }

  StageEngineTest() : pipeline_(path_, 2, Options()) {}

  static TestEngineOptions Options() {
    TestEngineOptions options;
    options.slots = 4;
    options.max_batch_tokens = 10;
    return options;
  }

  static std::string path_;
  EnginePipeline pipeline_;
};

std::string StageEngineTest::path_;

TEST_F(StageEngineTest, AnEntryThatDoesNotFitIsRefusedAndItsNeighbourIsNot) {
  struct Row {
    const char* name;
    void (*spoil)(v1::StepEntry&);
    absl::StatusCode code;
    const char* says;
    RefusalCause cause;
  };
  const Row rows[] = {
      {"position behind", [](v1::StepEntry& e) { e.set_expected_position(2); }, absl::StatusCode::kAborted,
       "slot 1 is at position 3", RefusalCause::kPosition},
      {"position ahead", [](v1::StepEntry& e) { e.set_expected_position(4); }, absl::StatusCode::kAborted, "expects 4",
       RefusalCause::kPosition},
      {"foreign sequence", [](v1::StepEntry& e) { e.set_sequence(8); }, absl::StatusCode::kAborted,
       "slot 1 holds another sequence, not sequence 8", RefusalCause::kSequence},
      {"free slot", [](v1::StepEntry& e) { e.set_slot(3); }, absl::StatusCode::kAborted, "slot 3 holds nothing",
       RefusalCause::kSequence},
      {"slot beyond the pool", [](v1::StepEntry& e) { e.set_slot(4); }, absl::StatusCode::kInvalidArgument,
       "slot 4 is outside the pool of 4", RefusalCause::kSlot},
      {"negative slot", [](v1::StepEntry& e) { e.set_slot(-1); }, absl::StatusCode::kInvalidArgument, "slot -1",
       RefusalCause::kSlot},
      {"token beyond the vocabulary", [](v1::StepEntry& e) { e.set_token_ids(0, kVocab); },
       absl::StatusCode::kInvalidArgument, "token id 61 is not below 61", RefusalCause::kTokens},
      {"huge token", [](v1::StepEntry& e) { e.set_token_ids(0, 0xffffffff); }, absl::StatusCode::kInvalidArgument,
       "token id 4294967295", RefusalCause::kTokens},
      {"no tokens", [](v1::StepEntry& e) { e.clear_token_ids(); }, absl::StatusCode::kInvalidArgument, "without tokens",
       RefusalCause::kTokens},
      {"too many rows",
       [](v1::StepEntry& e) {
         for (int i = 0; i < 9; ++i) e.add_token_ids(1);
       },
       absl::StatusCode::kInvalidArgument, "10 rows after 1", RefusalCause::kRows},
      {"scored token beyond the vocabulary", [](v1::StepEntry& e) { e.add_score_token_ids(kVocab); },
       absl::StatusCode::kInvalidArgument, "token id 61", RefusalCause::kTokens},
      {"too many scores",
       [](v1::StepEntry& e) {
         e.add_score_token_ids(1);
         e.add_score_token_ids(1);
       },
       absl::StatusCode::kInvalidArgument, "2 scores for 1 tokens", RefusalCause::kTokens},
      {"slot twice",
       [](v1::StepEntry& e) {
         e.set_slot(0);
         e.set_sequence(1);
         e.set_expected_position(3);
       },
       absl::StatusCode::kInvalidArgument, "slot 0 is in the step twice", RefusalCause::kSlot},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    EnginePipeline pipeline(path_, 2, Options());
    for (int slot : {0, 1, 2}) {
      ASSERT_THAT(pipeline.AttachFresh(slot, slot + 1), IsOk());
      ASSERT_THAT(pipeline.Feed(slot, slot + 1, 0, {4, 5, 6}), IsOk());
    }
    const auto before = pipeline.CopyState(1, 2, 3);
    ASSERT_THAT(before, IsOk());
    v1::Step step;
    *step.add_entries() = Entry(0, 1, 3, {7}, true, true);
    *step.add_entries() = Entry(1, 2, 3, {7}, true, true);
    *step.add_entries() = Entry(2, 3, 3, {7}, true, true);
    row.spoil(*step.mutable_entries(1));
    const absl::StatusOr<StepOutput> output = pipeline.Step(step);
    ASSERT_THAT(output, IsOk());
    ASSERT_EQ(output->result.entries_size(), 3);
    EXPECT_THAT(StatusOf(output->result.entries(1)), StatusIs(row.code, HasSubstr(row.says)));
    EXPECT_FALSE(output->result.entries(1).has_token_id());
    EXPECT_THAT(output->refused_here, ElementsAre(row.cause)) << "by the first stage, once";
    EXPECT_THAT(StatusOf(output->result.entries(0)), IsOk());
    EXPECT_THAT(StatusOf(output->result.entries(2)), IsOk());
    EXPECT_EQ(LogitsOf(*output, 1), LogitsOf(*output, 3)) << "the same tokens in two slots";
    EXPECT_EQ(output->result.entries(2).position(), 4u);
    // What was refused has changed nothing.
    const auto after = pipeline.CopyState(1, 2, 3);
    ASSERT_THAT(after, IsOk());
    EXPECT_EQ(*after, *before);
  }
}

TEST_F(StageEngineTest, AnEntryThatOnlyALaterStageRefusesIsSkippedAfterIt) {
  EnginePipeline pipeline(path_, 3, Options());
  for (int slot : {0, 1}) ASSERT_THAT(pipeline.AttachFresh(slot, slot + 1), IsOk());
  // Stage 1 has lost the slot.
  v1::ReleaseSlot release;
  release.set_slot(0);
  release.set_sequence(1);
  pipeline.stage(1).Release(release);
  v1::Step step;
  *step.add_entries() = Entry(0, 1, 0, {1, 2}, true, true);
  *step.add_entries() = Entry(1, 2, 0, {3, 4, 5}, true, true);
  const absl::StatusOr<StepOutput> output = pipeline.Step(step);
  ASSERT_THAT(output, IsOk());
  EXPECT_THAT(StatusOf(output->result.entries(0)), StatusIs(absl::StatusCode::kAborted));
  ASSERT_THAT(StatusOf(output->result.entries(1)), IsOk());
  EnginePipeline alone(path_, 1, Options());
  ASSERT_THAT(alone.AttachFresh(0, 2), IsOk());
  EXPECT_EQ(LogitsOf(*output, 2), LogitsOf(*alone.Feed(0, 2, 0, {3, 4, 5}), 2));
  // The stages now stand at different positions: the sequence is refused for good, wherever it claims to be.
  EXPECT_THAT(pipeline.Feed(0, 1, 2, {1}).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline.Feed(0, 1, 0, {1}).status(), StatusIs(absl::StatusCode::kAborted));
}

TEST_F(StageEngineTest, AStepWhoseEntriesAreAllRefusedPasses) {
  v1::Step step;
  *step.add_entries() = Entry(0, 1, 0, {1});
  const absl::StatusOr<StepOutput> output = pipeline_.Step(step);
  ASSERT_THAT(output, IsOk());
  EXPECT_THAT(StatusOf(output->result.entries(0)), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline_.Step(v1::Step()), IsOk()) << "no entries at all";
}

TEST_F(StageEngineTest, StepsAndTheirInputMustFollowEachOther) {
  StageEngine& first = pipeline_.stage(0);
  StageEngine& second = pipeline_.stage(1);
  v1::Step step;
  step.set_step_id(2);
  EXPECT_THAT(first.Enqueue(step, nullptr), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("step 2")));
  step.set_step_id(1);
  LinkFrame input;
  EXPECT_THAT(first.Enqueue(step, &input), StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(second.Enqueue(step, nullptr), StatusIs(absl::StatusCode::kInternal));
  input.header.step_id = 2;
  EXPECT_THAT(second.Enqueue(step, &input), StatusIs(absl::StatusCode::kInvalidArgument));
  input.header.step_id = 1;
  input.header.rows = 1;
  EXPECT_THAT(second.Enqueue(step, &input), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 rows")));
}

TEST_F(StageEngineTest, ASlotIsCleanWhenGivenOut) {
  ASSERT_THAT(pipeline_.AttachFresh(2, 1), IsOk());
  const absl::StatusOr<StepOutput> first = pipeline_.Feed(2, 1, 0, {5, 6});
  ASSERT_THAT(first, IsOk());
  ASSERT_THAT(pipeline_.AttachFresh(2, 2), IsOk());
  const absl::StatusOr<StepOutput> second = pipeline_.Feed(2, 2, 0, {5, 6});
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(LogitsOf(*first, 1), LogitsOf(*second, 2));
  // The old holder is out.
  EXPECT_THAT(pipeline_.Feed(2, 1, 2, {5}).status(), StatusIs(absl::StatusCode::kAborted));
}

TEST_F(StageEngineTest, AWarmSlotGoesOnAndAnotherPlaceIsAborted) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  const std::string whole = FeedInChunks(pipeline_, 0, 1, 0, {1, 2, 3, 4}, 4);
  ASSERT_THAT(pipeline_.AttachFresh(1, 2), IsOk());
  std::string parts = FeedInChunks(pipeline_, 1, 2, 0, {1, 2}, 2);
  v1::AttachSequence warm;
  warm.set_slot(1);
  warm.set_sequence(3);
  warm.set_warm_sequence(2);
  warm.set_position(1);
  EXPECT_THAT(pipeline_.Attach(warm),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("slot 1 does not hold sequence 2")));
  warm.set_position(2);
  warm.set_slot(0);
  EXPECT_THAT(pipeline_.Attach(warm), StatusIs(absl::StatusCode::kAborted));
  warm.set_slot(1);
  ASSERT_THAT(pipeline_.Attach(warm), IsOk());
  parts += FeedInChunks(pipeline_, 1, 3, 2, {3, 4}, 2);
  EXPECT_EQ(parts, whole);
}

TEST_F(StageEngineTest, AnAttachThatCannotBeLeavesTheSlotAsItWas) {
  struct Row {
    const char* name;
    void (*spoil)(v1::AttachSequence&);
    absl::StatusCode code;
  };
  const Row rows[] = {
      {"slot", [](v1::AttachSequence& a) { a.set_slot(4); }, absl::StatusCode::kInvalidArgument},
      {"position of a fresh one", [](v1::AttachSequence& a) { a.set_position(3); }, absl::StatusCode::kInvalidArgument},
      {"no source", [](v1::AttachSequence& a) { a.clear_source(); }, absl::StatusCode::kInvalidArgument},
      {"sampling", [](v1::AttachSequence& a) { a.mutable_sampling()->set_top_p(-1); },
       absl::StatusCode::kInvalidArgument},
      {"turn token", [](v1::AttachSequence& a) { a.add_turn_token_ids(kVocab); }, absl::StatusCode::kInvalidArgument},
      {"banned pairs", [](v1::AttachSequence& a) { a.add_banned_token_ids(3); }, absl::StatusCode::kInvalidArgument},
      {"model", [](v1::AttachSequence& a) { a.mutable_snapshot()->set_model_fingerprint("other"); },
       absl::StatusCode::kFailedPrecondition},
      {"missing records", [](v1::AttachSequence& a) { *a.mutable_snapshot() = ManifestOf("s", 0, {}); },
       absl::StatusCode::kDataLoss},
      {"records of a wrong size",
       [](v1::AttachSequence& a) {
         *a.mutable_snapshot() = ManifestOf("s", 0, {"a", "b", "c", "d"});
       },
       absl::StatusCode::kDataLoss},
      {"snapshot at another position", [](v1::AttachSequence& a) { *a.mutable_snapshot() = ManifestOf("s", 5, {}); },
       absl::StatusCode::kInvalidArgument},
  };
  ASSERT_THAT(pipeline_.AttachFresh(1, 7), IsOk());
  ASSERT_THAT(pipeline_.Feed(1, 7, 0, {1}), IsOk());
  uint64_t position = 1;
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    v1::AttachSequence attach;
    attach.set_slot(1);
    attach.set_sequence(8);
    attach.set_fresh(true);
    row.spoil(attach);
    EXPECT_THAT(pipeline_.stage(0).Attach(attach), StatusIs(row.code));
    EXPECT_THAT(pipeline_.Feed(1, 7, position++, {1}), IsOk());
  }
}

TEST_F(StageEngineTest, AReservedSlotComputesNothingUntilItsStateIsThere) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {1, 2}), IsOk());
  const auto records = pipeline_.CopyState(0, 1, 2);
  ASSERT_THAT(records, IsOk());
  StageEngine& first = pipeline_.stage(0);
  v1::AttachSequence attach;
  attach.set_slot(1);
  attach.set_sequence(2);
  attach.set_position(2);
  *attach.mutable_snapshot() = ManifestOf("s", 2, *records);
  const std::vector<std::string> mine(records->begin(), records->begin() + 2);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  EXPECT_EQ(first.slots_used(), 2);
  EXPECT_THAT(pipeline_.Feed(1, 2, 2, {1}).status(), StatusIs(absl::StatusCode::kAborted, HasSubstr("loading")));

  // Given away meanwhile: what comes is dropped.
  v1::ReleaseSlot release;
  release.set_slot(1);
  release.set_sequence(2);
  first.Release(release);
  EXPECT_THAT(Install(first, 1, 2, mine), StatusIs(absl::StatusCode::kAborted));
  ASSERT_THAT(first.Attach(attach), IsOk());
  attach.set_sequence(3);
  ASSERT_THAT(first.Attach(attach), IsOk());
  EXPECT_THAT(Install(first, 1, 2, mine), StatusIs(absl::StatusCode::kAborted));
  // Spoilt records free the slot.
  std::vector<std::string> spoilt = mine;
  spoilt[1].pop_back();
  EXPECT_THAT(Install(first, 1, 3, spoilt), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layer 1")));
  EXPECT_EQ(first.slots_used(), 1);
  ASSERT_THAT(first.Attach(attach), IsOk());
  spoilt = mine;
  std::memset(spoilt[0].data(), 0xff, 4);  // A NaN.
  EXPECT_THAT(Install(first, 1, 3, spoilt), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not finite")));
  ASSERT_THAT(first.Attach(attach), IsOk());
  first.AbandonLoad(1, 2);
  EXPECT_EQ(first.slots_used(), 2) << "not its slot";
  first.AbandonLoad(1, 3);
  EXPECT_EQ(first.slots_used(), 1);
  // And in the end it works.
  ASSERT_THAT(first.Attach(attach), IsOk());
  EXPECT_THAT(Install(first, 1, 3, mine), IsOk());
}

TEST_F(StageEngineTest, SavesOnlyTheStateThatIsMeant) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {1, 2}), IsOk());
  EXPECT_THAT(pipeline_.CopyState(0, 1, 1).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline_.CopyState(0, 2, 2).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline_.CopyState(9, 1, 2).status(), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(pipeline_.CopyState(0, 1, 2), IsOk());
}

TEST_F(StageEngineTest, ResetFreesEverySlotAndStartsTheStepsAnew) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {1, 2}), IsOk());
  EnginePipeline fresh(path_, 1, Options());
  fresh.stage(0).Reset();
  EXPECT_EQ(fresh.stage(0).slots_used(), 0);
  ASSERT_THAT(fresh.stage(0).WarmUp(), IsOk());
  EXPECT_EQ(fresh.stage(0).slots_used(), 0);
  ASSERT_THAT(fresh.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(fresh.Feed(0, 1, 0, {1, 2}), IsOk());
}

TEST_F(StageEngineTest, ScoresAreTheLogprobsOfDrawnTokens) {
  // Greedy: the scored token is the one that was drawn.
  v1::Sampling sampling;
  sampling.set_top_logprobs(3);
  ASSERT_THAT(pipeline_.AttachFresh(0, 1, sampling), IsOk());
  const absl::StatusOr<StepOutput> drawn = pipeline_.Feed(0, 1, 0, {1, 2, 3}, false, true);
  ASSERT_THAT(drawn, IsOk());
  const v1::EntryResult& entry = drawn->result.entries(0);
  ASSERT_EQ(entry.top_logprobs_size(), 3);
  EXPECT_EQ(entry.top_logprobs(0).token_id(), entry.token_id());
  EXPECT_EQ(entry.top_logprobs(0).logprob(), entry.logprob());
  EXPECT_TRUE(drawn->logits.empty());

  ASSERT_THAT(pipeline_.AttachFresh(1, 2), IsOk());
  v1::Step step;
  *step.add_entries() = Entry(1, 2, 0, {1, 2, 3}, false);
  for (uint32_t id : {2u, 3u, entry.token_id()}) step.mutable_entries(0)->add_score_token_ids(id);
  const absl::StatusOr<StepOutput> scored = pipeline_.Step(step);
  ASSERT_THAT(scored, IsOk());
  ASSERT_EQ(scored->result.entries(0).scores_size(), 3);
  EXPECT_EQ(scored->result.entries(0).scores(2), entry.logprob());
  EXPECT_LT(scored->result.entries(0).scores(0), 0);
  EXPECT_FALSE(scored->result.entries(0).has_token_id());

  // One fewer than tokens, and a draw beside it.
  ASSERT_THAT(pipeline_.AttachFresh(2, 3), IsOk());
  v1::Step both;
  *both.add_entries() = Entry(2, 3, 0, {1, 2, 3}, false, true);
  both.mutable_entries(0)->add_score_token_ids(2);
  both.mutable_entries(0)->add_score_token_ids(3);
  const absl::StatusOr<StepOutput> mixed = pipeline_.Step(both);
  ASSERT_THAT(mixed, IsOk());
  EXPECT_EQ(mixed->result.entries(0).token_id(), entry.token_id());
  EXPECT_EQ(mixed->result.entries(0).logprob(), entry.logprob());
  ASSERT_EQ(mixed->result.entries(0).scores_size(), 2);
  EXPECT_EQ(mixed->result.entries(0).scores(1), scored->result.entries(0).scores(1));
}

// T3 in small: a turn that was cut and attached again, with the tokens it had generated, draws what it would have
// drawn.
TEST_F(StageEngineTest, ATurnAttachedAgainDrawsTheSameTokens) {
  v1::Sampling sampling;
  sampling.set_temperature(1.3f);
  sampling.set_seed(99);
  sampling.set_presence_penalty(0.8f);
  sampling.set_frequency_penalty(0.4f);
  const std::vector<uint32_t> prompt = {8, 9, 10};
  const auto generate = [&](int slot, uint64_t sequence, uint64_t position, uint32_t next, int count) {
    std::vector<uint32_t> tokens;
    for (int i = 0; i < count; ++i) {
      const absl::StatusOr<StepOutput> output = pipeline_.Feed(slot, sequence, position + i, {next}, false, true);
      EXPECT_THAT(output, IsOk());
      next = output->result.entries(0).token_id();
      tokens.push_back(next);
    }
    return tokens;
  };
  ASSERT_THAT(pipeline_.AttachFresh(0, 1, sampling), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {8, 9}, false), IsOk());
  const std::vector<uint32_t> whole = generate(0, 1, 2, 10, 24);

  v1::AttachSequence attach;
  attach.set_slot(1);
  attach.set_sequence(2);
  attach.set_fresh(true);
  *attach.mutable_sampling() = sampling;
  for (int i = 0; i < 11; ++i) attach.add_turn_token_ids(whole[i]);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  uint64_t position = 0;
  for (uint32_t token : {8u, 9u, 10u}) ASSERT_THAT(pipeline_.Feed(1, 2, position++, {token}, false), IsOk());
  for (int i = 0; i < 10; ++i) ASSERT_THAT(pipeline_.Feed(1, 2, position++, {whole[i]}, false), IsOk());
  EXPECT_EQ(generate(1, 2, position, whole[10], 13), std::vector<uint32_t>(whole.begin() + 11, whole.end()));
}

TEST_F(StageEngineTest, BannedTokensAreNeverDrawn) {
  v1::AttachSequence attach;
  attach.set_fresh(true);
  attach.set_sequence(1);
  attach.add_banned_token_ids(0);
  attach.add_banned_token_ids(60);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  const absl::StatusOr<StepOutput> output = pipeline_.Feed(0, 1, 0, {1, 2}, false, true);
  ASSERT_THAT(output, IsOk());
  EXPECT_EQ(output->result.entries(0).token_id(), 60u);
}

// RWKV-7b's caches hold a fixed number of tokens; everything else has no end.
TEST_F(StageEngineTest, WhatPassesTheContextIsRefusedBeforeItIsComputed) {
  TestEngineOptions options = Options();
  options.deep_embed_context = 8;  // Less than a full batch: the warm-up must fit, too.
  EnginePipeline pipeline(WriteSmallModel(ModelVersion::k7b), 2, options);
  for (int stage : {0, 1}) ASSERT_THAT(pipeline.stage(stage).WarmUp(), IsOk());
  ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline.Feed(0, 1, 0, SomeTokens(5, 1)), IsOk());
  const auto before = pipeline.CopyState(0, 1, 5);
  ASSERT_THAT(before, IsOk());
  EXPECT_THAT(pipeline.Feed(0, 1, 5, SomeTokens(4, 2)).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("4 tokens after 5 pass the model's context of 8 tokens")));
  EXPECT_EQ(*pipeline.CopyState(0, 1, 5), *before);
  EXPECT_THAT(pipeline.Feed(0, 1, 5, SomeTokens(3, 2)), IsOk());
  EXPECT_THAT(pipeline.Feed(0, 1, 8, {1}).status(), StatusIs(absl::StatusCode::kFailedPrecondition));
}

TEST_F(StageEngineTest, ATunedInitialStateIsWhatAFreshSlotHolds) {
  rwkv::testing::RandomModelOptions options = SmallModel();
  options.time_state = true;
  const std::string path = TempPath("time-state.safetensors");
  ASSERT_THAT(rwkv::testing::WriteRandomModel(options, path), IsOk());
  EnginePipeline tuned(path, 2, Options());
  ASSERT_THAT(tuned.AttachFresh(0, 1), IsOk());
  const auto fresh = tuned.CopyState(0, 1, 0);
  ASSERT_THAT(fresh, IsOk());
  const std::string zeros((*fresh)[0].size(), '\0');
  for (const std::string& record : *fresh) EXPECT_NE(record, zeros);
  ASSERT_THAT(tuned.Feed(0, 1, 0, {1, 2, 3}), IsOk());
  ASSERT_THAT(tuned.AttachFresh(0, 2), IsOk());
  EXPECT_EQ(*tuned.CopyState(0, 2, 0), *fresh);
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  const auto plain = pipeline_.CopyState(0, 1, 0);
  ASSERT_THAT(plain, IsOk());
  for (const std::string& record : *plain) EXPECT_EQ(record, zeros);
}

class TunedStateTest : public StageEngineTest {
 protected:
  TunedStateTest() {
    rwkv::testing::RandomModelOptions model = SmallModel();
    model.time_state = true;  // Of its own: replaced by the tuned one.
    model_path_ = TempPath("own-state.safetensors");
    EXPECT_THAT(rwkv::testing::WriteRandomModel(model, model_path_), IsOk());
    model.seed = 2;
    const auto other = rwkv::testing::MakeRandomModel(model);
    EXPECT_THAT(other, IsOk());
    std::vector<rwkv::testing::RawTensor> states;
    for (const rwkv::testing::RawTensor& tensor : *other) {
      if (absl::EndsWith(tensor.spec.name, "time_state")) states.push_back(tensor);
    }
    const std::string file = TempPath("tuned.safetensors");
    EXPECT_THAT(rwkv::testing::WriteFileAtomically(file, rwkv::testing::SafetensorsBytes(states)), IsOk());
    options_ = Options();
    options_.max_batch_tokens = 32;
    options_.initial_states = {absl::StrCat("poet=", file)};
    tuned_ = std::make_unique<EnginePipeline>(model_path_, 1, options_);
    id_ = tuned_->stage(0).tuned_state_ids().front();
  }

  std::string model_path_;
  TestEngineOptions options_;
  std::string id_;
  std::unique_ptr<EnginePipeline> tuned_;  // One stage.
};

TEST_F(TunedStateTest, ItReplacesTheModelsOwnAndLeavesNoTrace) {
  ASSERT_THAT(tuned_->AttachFresh(0, 1), IsOk());
  const auto own = tuned_->CopyState(0, 1, 0);
  ASSERT_THAT(tuned_->AttachFresh(0, 2, {}, id_), IsOk());
  const auto tuned = tuned_->CopyState(0, 2, 0);
  ASSERT_THAT(own, IsOk());
  ASSERT_THAT(tuned, IsOk());
  for (size_t layer = 0; layer < own->size(); ++layer) EXPECT_NE((*tuned)[layer], (*own)[layer]) << layer;
  ASSERT_THAT(tuned_->Feed(0, 2, 0, SomeTokens(5, 1)), IsOk());
  ASSERT_THAT(tuned_->AttachFresh(0, 3), IsOk());
  EXPECT_EQ(*tuned_->CopyState(0, 3, 0), *own);
  ASSERT_THAT(tuned_->AttachFresh(0, 4, {}, id_), IsOk());
  EXPECT_EQ(*tuned_->CopyState(0, 4, 0), *tuned);
}

TEST_F(TunedStateTest, AnUnknownOneIsRefusedAndTheSlotStaysAsItWas) {
  ASSERT_THAT(tuned_->AttachFresh(0, 1, {}, id_), IsOk());
  EXPECT_THAT(tuned_->AttachFresh(0, 2, {}, "poet@00000000"),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("no tuned state \"poet@00000000\""), HasSubstr(id_))));
  EXPECT_THAT(tuned_->AttachFresh(0, 2, {}, "poet"), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(tuned_->Feed(0, 1, 0, {1}), IsOk());
  EXPECT_THAT(pipeline_.AttachFresh(0, 1, {}, id_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("there are: none")));
}

// Prefill equals decodes, one stage equals two, saved and restored equals never stopped; with a neighbour of another
// beginning in the batch.
TEST_F(TunedStateTest, TheLawsHoldFromATunedStart) {
  const std::vector<uint32_t> tokens = SomeTokens(20, 3);
  ASSERT_THAT(tuned_->AttachFresh(0, 1, {}, id_), IsOk());
  const auto whole = tuned_->Feed(0, 1, 0, tokens);
  ASSERT_THAT(whole, IsOk());
  const auto end = tuned_->CopyState(0, 1, tokens.size());
  ASSERT_THAT(end, IsOk());

  EnginePipeline two(model_path_, 2, options_);
  ASSERT_THAT(two.AttachFresh(0, 1, {}, id_), IsOk());
  ASSERT_THAT(two.AttachFresh(1, 2), IsOk());
  std::string logits;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i == 7) {  // Moved to another slot through its records.
      const auto records = two.CopyState(0, 1, i);
      ASSERT_THAT(records, IsOk());
      ASSERT_THAT(two.Restore(3, 3, i, *records), IsOk());
    }
    const int slot = i < 7 ? 0 : 3;
    const uint64_t sequence = i < 7 ? 1 : 3;
    v1::Step step;
    *step.add_entries() = Entry(1, 2, i, {tokens[i]});
    *step.add_entries() = Entry(slot, sequence, i, {tokens[i]});
    const auto output = two.Step(step);
    ASSERT_THAT(output, IsOk());
    logits += LogitsOf(*output, sequence);
  }
  EXPECT_EQ(logits, LogitsOf(*whole, 1));
  EXPECT_EQ(*two.CopyState(3, 3, tokens.size()), *end);
}

}  // namespace
}  // namespace rwkv::worker
