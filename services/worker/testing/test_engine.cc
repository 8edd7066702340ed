#include "services/worker/testing/test_engine.h"

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/device.h"
#include "kernels/base/status_macros.h"
#include "kernels/conformance/protected_device.h"
#include "kernels/cpu/emulated_amx.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/layer_range.h"
#include "services/worker/model/tuned_states.h"
#include "services/worker/model/weights.h"
#include "services/worker/testing/lazy_device.h"

namespace rwkv::worker {
namespace {

absl::StatusOr<std::unique_ptr<kernels::Device>> OpenTestDevice(const std::string& name, int threads) {
  if (kernels::cuda::IsEmulatedDevice(name)) return kernels::cuda::OpenEmulatedDevice(name);
  if (name == kernels::cpu::kEmulatedAmxDevice) return kernels::cpu::OpenEmulatedAmx(name);
  const bool is_plain = name != kLazyDevice && name != kProtectedDevice;
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Device> device,
                        kernels::OpenDevice(is_plain ? name : "auto", threads));
  if (name == kLazyDevice) return MakeLazy(std::move(device));
  if (name == kProtectedDevice) return kernels::conformance::ProtectDevice(std::move(device));
  return device;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageEngine>> MakeTestEngine(const std::string& path, int stage, int stages,
                                                            const TestEngineOptions& options) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Device> device, OpenTestDevice(options.device, options.threads));
  if (options.wrap != nullptr) device = options.wrap(std::move(device));
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<const checkpoint::Checkpoint> checkpoint, checkpoint::Checkpoint::Open(path));
  RWKV_ASSIGN_OR_RETURN(const checkpoint::ModelConfig config, checkpoint::ModelConfig::FromCheckpoint(*checkpoint));
  RWKV_ASSIGN_OR_RETURN(const LayerRange layers, LayersOfStage(stage, stages, config.layer_count));
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<const StageWeights> weights,
                        StageWeights::Load(checkpoint, config, layers, *device));
  StageModelOptions model_options;
  model_options.max_rows = options.max_batch_tokens;
  model_options.group_norm_epsilon = options.group_norm_epsilon;
  model_options.deep_embed_context = options.deep_embed_context;
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<StageModel> model,
                        CreateStageModel(std::move(weights), *device, model_options));
  if (options.device == kLazyDevice) model = MakeLazy(std::move(model));
  StageEngine::Options engine;
  engine.slots = options.slots;
  engine.max_batch_tokens = options.max_batch_tokens;
  engine.fingerprint = kTestFingerprint;
  RWKV_ASSIGN_OR_RETURN(TunedStates tuned_states, LoadTunedStates(options.initial_states, config, layers));
  return StageEngine::Create(std::move(engine), std::move(device), std::move(model), std::move(tuned_states));
}

EnginePipeline::EnginePipeline(const std::string& path, int stages, const TestEngineOptions& options) {
  for (int stage = 0; stage < stages; ++stage) {
    absl::StatusOr<std::unique_ptr<StageEngine>> engine = MakeTestEngine(path, stage, stages, options);
    if (!engine.ok()) {
      std::cerr << path << ": " << engine.status() << std::endl;
      std::abort();
    }
    stages_.push_back(*std::move(engine));
  }
}

absl::Status EnginePipeline::Attach(const v1::AttachSequence& attach) {
  for (const auto& stage : stages_) RWKV_RETURN_IF_ERROR(stage->Attach(attach));
  return absl::OkStatus();
}

absl::Status EnginePipeline::AttachFresh(int slot, uint64_t sequence, const v1::Sampling& sampling,
                                         const std::string& initial_state) {
  v1::AttachSequence attach;
  attach.set_slot(slot);
  attach.set_sequence(sequence);
  attach.set_fresh(true);
  attach.set_initial_state(initial_state);
  *attach.mutable_sampling() = sampling;
  return Attach(attach);
}

absl::StatusOr<StepOutput> EnginePipeline::Step(v1::Step step) {
  step.set_step_id(++steps_);
  StepOutput output;
  std::vector<RefusalCause> causes;
  for (size_t i = 0; i < stages_.size(); ++i) {
    RWKV_RETURN_IF_ERROR(stages_[i]->Enqueue(step, i == 0 ? nullptr : Pass(output.frame, *stages_[i])));
    RWKV_ASSIGN_OR_RETURN(output, stages_[i]->Finish());
    causes.insert(causes.end(), output.refused_here.begin(), output.refused_here.end());
  }
  output.refused_here = std::move(causes);
  return output;
}

absl::StatusOr<StepOutput> EnginePipeline::Feed(int slot, uint64_t sequence, uint64_t position,
                                                const std::vector<uint32_t>& tokens, bool logits, bool sample) {
  v1::Step step;
  *step.add_entries() = Entry(slot, sequence, position, tokens, logits, sample);
  RWKV_ASSIGN_OR_RETURN(StepOutput output, Step(std::move(step)));
  const v1::StatusProto& status = output.result.entries(0).status();
  if (status.code() != 0) return absl::Status(static_cast<absl::StatusCode>(status.code()), status.message());
  return output;
}

absl::StatusOr<std::vector<std::string>> EnginePipeline::CopyState(int slot, uint64_t sequence, uint64_t position) {
  v1::SaveSnapshot save;
  save.set_slot(slot);
  save.set_sequence(sequence);
  save.set_expected_position(position);
  std::vector<std::string> all;
  for (const auto& stage : stages_) {
    RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<StateCopy> state, stage->CopyState(save));
    RWKV_ASSIGN_OR_RETURN(const std::vector<absl::Span<const char>> records, state->Records(slot));
    for (absl::Span<const char> record : records) all.emplace_back(record.data(), record.size());
  }
  return all;
}

absl::Status EnginePipeline::Restore(int slot, uint64_t sequence, uint64_t position,
                                     const std::vector<std::string>& records) {
  v1::AttachSequence attach;
  attach.set_slot(slot);
  attach.set_sequence(sequence);
  attach.set_position(position);
  *attach.mutable_snapshot() = ManifestOf("snapshot", position, records);
  RWKV_RETURN_IF_ERROR(Attach(attach));
  size_t first = 0;
  for (const auto& stage : stages_) {
    const size_t layers = stage->model().weights().layers().size();
    RWKV_RETURN_IF_ERROR(Install(*stage, slot, sequence, absl::MakeConstSpan(records).subspan(first, layers)));
    first += layers;
  }
  return absl::OkStatus();
}

const LinkFrame* Pass(const LinkFrame& frame, StageEngine& next) {
  const LinkShape shape = next.link_shape();
  LinkFrame& input = next.input_frame();
  input.header = frame.header;
  std::copy_n(frame.x, frame.header.rows * shape.width, input.x);
  std::copy_n(frame.v_first, frame.header.rows * shape.v_first_width, input.v_first);
  return &input;
}

absl::Status Fill(StateCopy& state, absl::Span<const std::string> records) {
  const std::vector<absl::Span<char>> room = state.Room();
  for (size_t i = 0; i < room.size(); ++i) {
    if (records.size() != room.size() || records[i].size() != room[i].size()) {
      return absl::InvalidArgumentError("not a record of each layer");
    }
    std::copy(records[i].begin(), records[i].end(), room[i].begin());
  }
  return state.CheckRoom();
}

absl::Status Install(StageEngine& stage, int slot, uint64_t sequence, absl::Span<const std::string> records) {
  RWKV_ASSIGN_OR_RETURN(std::shared_ptr<StateCopy> state, stage.copies().Take());
  if (absl::Status status = Fill(*state, records); !status.ok()) {
    stage.AbandonLoad(slot, sequence);
    return status;
  }
  return stage.Install(slot, sequence, std::move(state));
}

std::string LogitsOf(const StepOutput& output, uint64_t sequence) {
  std::string bytes;
  for (const v1::LogitsRows& rows : output.logits) {
    if (rows.sequence() == sequence) bytes += rows.logits();
  }
  return bytes;
}

v1::StepEntry Entry(int slot, uint64_t sequence, uint64_t position, const std::vector<uint32_t>& tokens, bool logits,
                    bool sample) {
  v1::StepEntry entry;
  entry.set_slot(slot);
  entry.set_sequence(sequence);
  entry.set_expected_position(position);
  for (uint32_t token : tokens) entry.add_token_ids(token);
  entry.set_logits(logits);
  entry.set_sample(sample);
  return entry;
}

v1::SnapshotManifest ManifestOf(const std::string& id, uint64_t position, const std::vector<std::string>& records) {
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id(id);
  manifest.set_position(position);
  manifest.set_model_fingerprint(kTestFingerprint);
  for (size_t layer = 0; layer < records.size(); ++layer) {
    v1::RecordInfo& info = *manifest.add_records();
    info.set_snapshot_id(id);
    info.set_layer(static_cast<int>(layer));
    info.set_bytes(records[layer].size());
  }
  return manifest;
}

}  // namespace rwkv::worker
