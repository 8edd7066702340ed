// What rows a step computes. Checked once a step, so that operations can take it for granted.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

// The rows of one step as operations take them: the sizes for who launches them, the arrays in device memory.
struct StepRows {
  int64_t rows = 0;                     // >= 1
  int64_t span_count = 0;               // >= 1
  const SequenceSpan* spans = nullptr;  // [span_count]
  const int32_t* tokens = nullptr;      // [rows]
};

// Checks the rows of each step of a stage and puts them where a device's operations read them. Owned by one thread.
// Allocates nothing after Create(), but when the number of slots changes.
class StepRowsLoader {
 public:
  // kResourceExhausted: no memory.
  static absl::StatusOr<std::unique_ptr<StepRowsLoader>> Create(Device& device, int64_t max_rows, int64_t vocabulary);

  // Spans and tokens are host memory and done with on return; the result holds until the next Load(). `slots` are
  // those of the state pools. kInvalidArgument: spans that do not cover the rows in order, one token for each; a slot
  // outside the pools or given twice; a token outside the vocabulary; more than max_rows. Names the value.
  absl::StatusOr<StepRows> Load(absl::Span<const SequenceSpan> spans, absl::Span<const int32_t> tokens, int64_t slots,
                                Stream& stream);

 private:
  StepRowsLoader(int64_t max_rows, int64_t vocabulary) : max_rows_(max_rows), vocabulary_(vocabulary) {}

  absl::Status Check(absl::Span<const SequenceSpan> spans, absl::Span<const int32_t> tokens, int64_t slots);

  const int64_t max_rows_;
  const int64_t vocabulary_;
  std::vector<int64_t> last_step_;  // In which a slot was given.
  int64_t step_ = 0;
  // The event says when the stream has read the pinned ones.
  DeviceArray<SequenceSpan> pinned_spans_, spans_;
  DeviceArray<int32_t> pinned_tokens_, tokens_;
  std::unique_ptr<Event> copied_;
};

}  // namespace rwkv::kernels
