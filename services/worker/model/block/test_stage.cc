#include "services/worker/model/block/test_stage.h"

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/weights.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {

absl::StatusOr<std::unique_ptr<TestStage>> TestStage::Create(std::unique_ptr<kernels::Device> device,
                                                             checkpoint::ModelVersion version) {
  testing::RandomModelOptions options;
  options.version = version;
  const std::string path = absl::StrCat(::testing::TempDir(), "/", checkpoint::Name(version), ".safetensors");
  RWKV_RETURN_IF_ERROR(testing::WriteRandomModel(options, path));
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<const checkpoint::Checkpoint> file, checkpoint::Checkpoint::Open(path));
  RWKV_ASSIGN_OR_RETURN(const checkpoint::ModelConfig config, checkpoint::ModelConfig::FromCheckpoint(*file));
  std::unique_ptr<TestStage> stage(new TestStage(std::move(device)));
  RWKV_ASSIGN_OR_RETURN(stage->stream_, stage->device_->NewStream());
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<const StageWeights> weights,
                        StageWeights::Load(file, config, {0, config.layer_count}, *stage->device_));
  StageModelOptions model_options;
  model_options.max_rows = kMaxRows;
  model_options.deep_embed_context = 64;
  RWKV_ASSIGN_OR_RETURN(stage->model_, CreateStageModel(weights, *stage->device_, model_options));
  for (int layer = 0; layer < config.layer_count; ++layer) {
    for (const StateTensorSpec& tensor : stage->model_->state_layout().tensors()) {
      RWKV_ASSIGN_OR_RETURN(float* const state, stage->Zeros(kSlots * tensor.size()));
      stage->states_.push_back({state, tensor.size()});
    }
  }
  RWKV_ASSIGN_OR_RETURN(stage->x_, stage->Zeros(kMaxRows * config.width));
  RWKV_ASSIGN_OR_RETURN(stage->v_first_, stage->Zeros(kMaxRows * config.attention_width));
  RWKV_ASSIGN_OR_RETURN(stage->logits_, stage->Zeros(kMaxRows * config.vocab_size));
  stage->tokens_.reserve(kMaxRows);
  stage->logit_rows_.reserve(kMaxRows);
  return stage;
}

absl::StatusOr<float*> TestStage::Zeros(int64_t count) {
  RWKV_ASSIGN_OR_RETURN(kernels::DeviceArray<float> array, kernels::DeviceArray<float>::Create(*device_, count));
  RWKV_RETURN_IF_ERROR(stream_->Zero(array.data(), array.size_in_bytes()));
  buffers_.push_back(std::move(array));
  return buffers_.back().data();
}

std::vector<kernels::SequenceSpan> TestStage::Spans(const std::vector<int64_t>& lengths) {
  std::vector<kernels::SequenceSpan> spans;
  int64_t row = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    spans.push_back({static_cast<int32_t>(i), row, lengths[i]});
    row += lengths[i];
  }
  return spans;
}

absl::Status TestStage::Step(const std::vector<kernels::SequenceSpan>& spans) {
  tokens_.clear();
  logit_rows_.clear();
  for (const kernels::SequenceSpan& span : spans) {
    for (int64_t t = 0; t < span.row_count; ++t) {
      if (span.slot != kernels::kPaddingSlot) logit_rows_.push_back(static_cast<int64_t>(tokens_.size()));
      tokens_.push_back(static_cast<int32_t>(10 * (span.slot + 1) + t));
    }
  }
  StageStep step;
  step.spans = spans;
  step.rows = static_cast<int64_t>(tokens_.size());
  step.tokens = tokens_.data();
  step.x = x_;
  step.v_first = v_first_;
  step.logit_rows = logit_rows_;
  step.logits = logits_;
  StateView state;
  state.slots = kSlots;
  state.tensors_per_layer = static_cast<int>(model_->state_layout().tensors().size());
  state.tensors = states_.data();
  RWKV_RETURN_IF_ERROR(model_->Forward(step, state, *stream_));
  return stream_->Synchronize();
}

std::vector<float> TestStage::Get(const float* from, int64_t count) const {
  const auto pinned = *kernels::DeviceArray<float>::Create(*device_, count, kernels::MemoryKind::kPinned);
  EXPECT_OK(stream_->Copy(pinned.data(), from, pinned.size_in_bytes()));
  EXPECT_OK(stream_->Synchronize());
  return std::vector<float>(pinned.data(), pinned.data() + count);
}

std::vector<float> TestStage::logits() const {
  return Get(logits_, static_cast<int64_t>(logit_rows_.size()) * model_->weights().config().vocab_size);
}

std::vector<float> TestStage::states() const {
  std::vector<float> all;
  for (const kernels::StateTensor& state : states_) {
    const std::vector<float> part = Get(state.data, kSlots * state.stride);
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

}  // namespace rwkv::worker
