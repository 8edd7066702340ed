// The draws of one step that the device makes: by what, and what came of it, in pinned memory. A row whose logits the
// host gets anyway, or whose edits find no room, is drawn by the host's Sampler instead: with the same bits.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/sample.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "services/worker/engine/slot_table.h"

namespace rwkv::worker {

class DeviceDraws {
 public:
  // Of all rows of a step: logit biases, ids that were seen, and banned ranges.
  static constexpr int32_t kMaxEdits = 32768;

  DeviceDraws() = default;
  // For up to `rows` draws a step. kResourceExhausted: no memory.
  static absl::StatusOr<DeviceDraws> Create(kernels::Device& device, int64_t rows);

  // Begins a step; the one before must be finished.
  void Clear() { count_ = edit_count_ = 0; }
  // What will be drawn for `position` from that row of logits, by the penalties as they are. Gives its place among
  // results(), or -1: there is no room.
  int Add(const Turn& turn, uint64_t position, int64_t logits_row);
  int64_t count() const { return count_; }

  // Enqueues the draws. `logits` are [rows, vocab], `adjusted` [draws, vocab], both memory of the device.
  absl::Status Enqueue(kernels::SampleOp* sample, int64_t vocab, const float* logits, float* adjusted,
                       kernels::Stream& stream) const;

  // After the stream has passed them.
  const kernels::SampleResult& at(int place) const { return results_.data()[place]; }

 private:
  kernels::DeviceArray<kernels::SampleRow> rows_;
  kernels::DeviceArray<kernels::SampleEdit> edits_;
  kernels::DeviceArray<kernels::SampleResult> results_;
  int32_t count_ = 0;
  int32_t edit_count_ = 0;
};

// What the Sampler would have said of it. kInternal: nothing was drawn, in words.
absl::StatusOr<SampledToken> ToSampledToken(const kernels::SampleResult& result);

}  // namespace rwkv::worker
