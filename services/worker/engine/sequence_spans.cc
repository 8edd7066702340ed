#include "services/worker/engine/sequence_spans.h"

#include <utility>

#include "absl/time/clock.h"

namespace rwkv::worker {

using common::Span;

SequenceSpans::Sequence* SequenceSpans::Find(int slot, uint64_t sequence) {
  const auto it = sequences_.find(slot);
  return it == sequences_.end() || it->second.sequence != sequence ? nullptr : &it->second;
}

void SequenceSpans::OnAttach(const v1::AttachSequence& attach) {
  if (tracer_ == nullptr) return;
  if (const auto before = sequences_.find(attach.slot()); before != sequences_.end()) {
    EndWork(before->second);
    sequences_.erase(before);
  }
  const common::TraceContext parent = common::ParseTraceParent(attach.trace_parent(), attach.trace_state());
  if (!parent.valid() || !parent.sampled) return;
  Sequence& sequence = sequences_[attach.slot()];
  sequence.sequence = attach.sequence();
  sequence.parent = parent;
  sequence.attach = tracer_->Begin("worker.attach", Span::kInternal, parent);
  sequence.attach->Set("rwkv.slot", int64_t{attach.slot()});
  sequence.attach->Set("rwkv.position", static_cast<int64_t>(attach.position()));
  sequence.attach->Set("rwkv.source", attach.has_snapshot() ? "snapshot" : attach.fresh() ? "fresh" : "warm");
}

void SequenceSpans::OnAttached(int slot, uint64_t sequence, const absl::Status& status) {
  Sequence* const attached = Find(slot, sequence);
  if (attached == nullptr) return;
  if (!status.ok()) attached->attach->SetError(status.ToString());
  attached->attach->End();
  if (!status.ok()) sequences_.erase(slot);
}

void SequenceSpans::OnKept(int slot, uint64_t sequence) {
  if (Sequence* const attached = Find(slot, sequence); attached != nullptr)
    attached->attach->Set("rwkv.kept", int64_t{1});
}

common::TraceContext SequenceSpans::AttachContext(int slot, uint64_t sequence) const {
  const auto it = sequences_.find(slot);
  if (it == sequences_.end() || it->second.sequence != sequence) return {};
  return it->second.attach->context();
}

std::vector<int> SequenceSpans::OnStep(const v1::Step& step, bool own) {
  std::vector<int> slots;
  if (sequences_.empty()) return slots;
  for (const v1::StepEntry& entry : step.entries()) {
    Sequence* const sequence = Find(entry.slot(), entry.sequence());
    if (sequence == nullptr) continue;
    const char* const kind = own ? "worker.lease" : sequence->sampled ? "worker.decode" : "worker.prefill";
    if (sequence->work == nullptr || sequence->kind != kind) {
      EndWork(*sequence);
      sequence->work = tracer_->Begin(kind, Span::kInternal, sequence->parent);
      sequence->kind = kind;
    }
    sequence->tokens += entry.token_ids_size();
    sequence->sampled |= entry.sample();
    slots.push_back(entry.slot());
  }
  return slots;
}

void SequenceSpans::OnStepDone(const std::vector<int>& slots) {
  for (const int slot : slots) {
    const auto it = sequences_.find(slot);
    if (it != sequences_.end()) it->second.last_done = absl::Now();
  }
}

std::shared_ptr<Span> SequenceSpans::OnSave(const v1::SaveSnapshot& save) {
  Sequence* const sequence = Find(save.slot(), save.sequence());
  if (sequence == nullptr) return nullptr;
  EndWork(*sequence);
  std::shared_ptr<Span> span = tracer_->Begin("worker.save", Span::kInternal, sequence->parent);
  span->Set("rwkv.position", static_cast<int64_t>(save.expected_position()));
  return span;
}

void SequenceSpans::OnRelease(const v1::ReleaseSlot& release) {
  if (Sequence* const sequence = Find(release.slot(), release.sequence()); sequence != nullptr) {
    EndWork(*sequence);
    sequences_.erase(release.slot());
  }
}

void SequenceSpans::Clear() {
  for (auto& [slot, sequence] : sequences_) EndWork(sequence);
  sequences_.clear();
}

// Ends with its last step that is done, however long ago that was; one that is under way belongs to it, too.
void SequenceSpans::EndWork(Sequence& sequence) {
  if (sequence.work == nullptr) return;
  sequence.work->Set("rwkv.tokens", sequence.tokens);
  sequence.work->End(sequence.last_done);
  sequence.work = nullptr;
  sequence.tokens = 0;
  sequence.last_done = absl::InfinitePast();
}

}  // namespace rwkv::worker
