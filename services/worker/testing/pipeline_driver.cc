#include "services/worker/testing/pipeline_driver.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"

namespace rwkv::worker {

PipelineDriver::PipelineDriver(std::vector<std::shared_ptr<WorkerClient>> workers) : workers_(std::move(workers)) {}

PipelineDriver::~PipelineDriver() { Close(); }

void PipelineDriver::Close() {
  for (auto& stream : streams_) stream->Cancel();
  streams_.clear();
}

absl::Status PipelineDriver::Open(const std::string& router, const std::string& epoch, const std::string& state_store) {
  streams_.clear();
  steps_ = 0;
  for (size_t i = 0; i < workers_.size(); ++i) {
    streams_.push_back(workers_[i]->Execute());
    v1::ExecuteRequest request;
    v1::OpenEpoch& open = *request.mutable_open();
    open.set_router(router);
    open.set_epoch(epoch);
    open.set_stage_index(static_cast<int>(i));
    open.set_stage_count(stages());
    if (i + 1 < workers_.size()) open.set_next_address(workers_[i + 1]->address());
    open.set_state_store_address(state_store);
    (void)streams_[i]->Write(request);  // Read says what is wrong.
  }
  // From the last, since a stage is open only when the next one is: so whoever refuses is heard first.
  for (auto stream = streams_.rbegin(); stream != streams_.rend(); ++stream) {
    RWKV_ASSIGN_OR_RETURN(const v1::ExecuteResponse response, (*stream)->Read());
    if (!response.has_opened()) return absl::InternalError(absl::StrCat("not opened: ", response.ShortDebugString()));
  }
  return absl::OkStatus();
}

absl::Status PipelineDriver::WriteAll(const v1::ExecuteRequest& request) {
  for (auto& stream : streams_) RWKV_RETURN_IF_ERROR(stream->Write(request));
  return absl::OkStatus();
}

absl::Status PipelineDriver::Attach(const v1::AttachSequence& attach) {
  v1::ExecuteRequest request;
  *request.mutable_attach() = attach;
  RWKV_RETURN_IF_ERROR(WriteAll(request));
  absl::Status first;
  for (auto& stream : streams_) {
    RWKV_ASSIGN_OR_RETURN(const v1::ExecuteResponse response, stream->Read());
    if (!response.has_attached() || response.attached().sequence() != attach.sequence()) {
      return absl::InternalError(absl::StrCat("not attached: ", response.ShortDebugString()));
    }
    if (first.ok()) first = common::FromStatusProto(response.attached().status());
  }
  return first;
}

absl::Status PipelineDriver::AttachFresh(int slot, uint64_t sequence, const v1::Sampling& sampling) {
  v1::AttachSequence attach;
  attach.set_slot(slot);
  attach.set_sequence(sequence);
  attach.set_fresh(true);
  *attach.mutable_sampling() = sampling;
  return Attach(attach);
}

absl::StatusOr<v1::SnapshotManifest> PipelineDriver::Save(int slot, uint64_t sequence, uint64_t position,
                                                          const std::string& id, const std::string& fingerprint,
                                                          bool keep) {
  v1::ExecuteRequest request;
  request.mutable_save()->set_slot(slot);
  request.mutable_save()->set_sequence(sequence);
  request.mutable_save()->set_expected_position(position);
  request.mutable_save()->set_snapshot_id(id);
  request.mutable_save()->set_keep(keep);
  RWKV_RETURN_IF_ERROR(WriteAll(request));
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id(id);
  manifest.set_session_id("session");
  manifest.set_position(position);
  manifest.set_model_fingerprint(fingerprint);
  absl::Status first;
  for (auto& stream : streams_) {
    RWKV_ASSIGN_OR_RETURN(const v1::ExecuteResponse response, stream->Read());
    if (!response.has_saved() || response.saved().snapshot_id() != id) {
      return absl::InternalError(absl::StrCat("not saved: ", response.ShortDebugString()));
    }
    if (first.ok()) first = common::FromStatusProto(response.saved().status());
    for (const v1::RecordInfo& record : response.saved().records()) *manifest.add_records() = record;
  }
  RWKV_RETURN_IF_ERROR(first);
  return manifest;
}

absl::Status PipelineDriver::Release(int slot, uint64_t sequence) {
  v1::ExecuteRequest request;
  request.mutable_release()->set_slot(slot);
  request.mutable_release()->set_sequence(sequence);
  return WriteAll(request);
}

absl::Status PipelineDriver::WriteStep(v1::Step step) {
  step.set_step_id(++steps_);
  v1::ExecuteRequest request;
  *request.mutable_step() = std::move(step);
  return WriteAll(request);
}

absl::StatusOr<DrivenStep> PipelineDriver::ReadStep() {
  DrivenStep driven;
  for (;;) {
    RWKV_ASSIGN_OR_RETURN(v1::ExecuteResponse response, streams_.back()->Read());
    if (response.has_logits()) {
      driven.logits[response.logits().sequence()] += response.logits().logits();
    } else if (response.has_step()) {
      driven.result = std::move(*response.mutable_step());
      return driven;
    } else {
      return absl::InternalError(absl::StrCat("no step: ", response.ShortDebugString()));
    }
  }
}

absl::StatusOr<DrivenStep> PipelineDriver::Step(v1::Step step) {
  RWKV_RETURN_IF_ERROR(WriteStep(std::move(step)));
  return ReadStep();
}

absl::StatusOr<DrivenStep> PipelineDriver::Feed(int slot, uint64_t sequence, uint64_t position,
                                                const std::vector<uint32_t>& tokens, bool logits, bool sample) {
  v1::Step step;
  v1::StepEntry& entry = *step.add_entries();
  entry.set_slot(slot);
  entry.set_sequence(sequence);
  entry.set_expected_position(position);
  for (uint32_t token : tokens) entry.add_token_ids(token);
  entry.set_logits(logits);
  entry.set_sample(sample);
  RWKV_ASSIGN_OR_RETURN(DrivenStep driven, Step(std::move(step)));
  RWKV_RETURN_IF_ERROR(common::FromStatusProto(driven.result.entries(0).status()));
  return driven;
}

}  // namespace rwkv::worker
