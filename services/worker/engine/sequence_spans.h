// The spans of traced sequences on a worker: how long they were attached, fed, decoded, saved. None for a step.
//
//   worker.attach   from the command until the slot is ready, with the loading of a snapshot
//   worker.prefill  while it is fed what is known
//   worker.decode   while the router asks for each of its tokens
//   worker.lease    while it goes on by itself
//   worker.save     from the command until its records are in the store
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/tracing/trace_context.h"
#include "services/common/tracing/tracer.h"

namespace rwkv::worker {

// One thread's. All of it does nothing without a tracer, and nearly nothing for sequences that are not traced.
class SequenceSpans {
 public:
  // May be null; outlives it and the spans that it gives away.
  explicit SequenceSpans(common::Tracer* tracer) : tracer_(tracer) {}

  void OnAttach(const v1::AttachSequence& attach);
  void OnAttached(int slot, uint64_t sequence, const absl::Status& status);
  // Its snapshot is in this worker's memory.
  void OnKept(int slot, uint64_t sequence);
  // What the loading of its snapshot belongs to; not valid: to nothing.
  common::TraceContext AttachContext(int slot, uint64_t sequence) const;

  // A step is enqueued; `own`: the worker's own. The slots of it that are traced.
  std::vector<int> OnStep(const v1::Step& step, bool own);
  // Such a step is done.
  void OnStepDone(const std::vector<int>& slots);

  // Null: not traced. Ends when the last holder lets go.
  std::shared_ptr<common::Span> OnSave(const v1::SaveSnapshot& save);
  void OnRelease(const v1::ReleaseSlot& release);
  // The epoch is over.
  void Clear();

 private:
  struct Sequence {
    uint64_t sequence = 0;
    common::TraceContext parent;
    std::unique_ptr<common::Span> attach;  // Until it is attached.
    std::unique_ptr<common::Span> work;    // Null: nothing was fed since the last save.
    const char* kind = "";                 // Of `work`.
    int64_t tokens = 0;
    bool sampled = false;  // It has drawn a token: what comes is decoding.
    absl::Time last_done = absl::InfinitePast();
  };

  Sequence* Find(int slot, uint64_t sequence);
  void EndWork(Sequence& sequence);

  common::Tracer* const tracer_;
  std::map<int, Sequence> sequences_;  // By slot.
};

}  // namespace rwkv::worker
