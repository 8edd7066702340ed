#include "kernels/api/step_rows.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::StatusOr<std::unique_ptr<StepRowsLoader>> StepRowsLoader::Create(Device& device, int64_t max_rows,
                                                                       int64_t vocabulary) {
  std::unique_ptr<StepRowsLoader> loader(new StepRowsLoader(max_rows, vocabulary));
  RWKV_ASSIGN_OR_RETURN(loader->pinned_spans_,
                        DeviceArray<SequenceSpan>::Create(device, max_rows, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(loader->spans_, DeviceArray<SequenceSpan>::Create(device, max_rows));
  RWKV_ASSIGN_OR_RETURN(loader->pinned_tokens_, DeviceArray<int32_t>::Create(device, max_rows, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(loader->tokens_, DeviceArray<int32_t>::Create(device, max_rows));
  RWKV_ASSIGN_OR_RETURN(loader->copied_, device.NewEvent());
  return loader;
}

absl::StatusOr<StepRows> StepRowsLoader::Load(absl::Span<const SequenceSpan> spans, absl::Span<const int32_t> tokens,
                                              int64_t slots, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Check(spans, tokens, slots));
  RWKV_RETURN_IF_ERROR(copied_->WaitOnHost());
  std::copy(spans.begin(), spans.end(), pinned_spans_.data());
  std::copy(tokens.begin(), tokens.end(), pinned_tokens_.data());
  StepRows step;
  step.rows = static_cast<int64_t>(tokens.size());
  step.span_count = static_cast<int64_t>(spans.size());
  step.spans = spans_.data();
  step.tokens = tokens_.data();
  RWKV_RETURN_IF_ERROR(
      stream.Copy(spans_.data(), pinned_spans_.data(), step.span_count * static_cast<int64_t>(sizeof(SequenceSpan))));
  RWKV_RETURN_IF_ERROR(
      stream.Copy(tokens_.data(), pinned_tokens_.data(), step.rows * static_cast<int64_t>(sizeof(int32_t))));
  RWKV_RETURN_IF_ERROR(stream.Record(*copied_));
  return step;
}

absl::Status StepRowsLoader::Check(absl::Span<const SequenceSpan> spans, absl::Span<const int32_t> tokens,
                                   int64_t slots) {
  const auto rows = static_cast<int64_t>(tokens.size());
  if (rows < 1 || rows > max_rows_) {
    return absl::InvalidArgumentError(absl::StrCat("step: ", rows, " rows, not in 1 .. ", max_rows_));
  }
  if (slots < 1) return absl::InvalidArgumentError(absl::StrCat("step: state pools of ", slots, " slots"));
  if (static_cast<int64_t>(last_step_.size()) != slots) last_step_.assign(static_cast<size_t>(slots), 0);
  ++step_;
  int64_t next_row = 0;
  for (size_t i = 0; i < spans.size(); ++i) {
    const SequenceSpan& span = spans[i];
    if (span.slot < kPaddingSlot || span.slot >= slots) {
      return absl::InvalidArgumentError(absl::StrCat("step: slot ", span.slot, " is outside the pool of ", slots));
    }
    if (span.row_begin != next_row || span.row_count < 1 || span.row_count > rows - next_row) {
      return absl::InvalidArgumentError(absl::StrCat("step: span ", i, " has ", span.row_count, " rows from ",
                                                     span.row_begin, "; expected at least one from ", next_row, " of ",
                                                     rows));
    }
    next_row += span.row_count;
    if (span.slot == kPaddingSlot) continue;
    if (last_step_[span.slot] == step_) {
      return absl::InvalidArgumentError(absl::StrCat("step: slot ", span.slot, " is given twice"));
    }
    last_step_[span.slot] = step_;
  }
  if (next_row != rows) {
    return absl::InvalidArgumentError(absl::StrCat("step: spans cover ", next_row, " of ", rows, " rows"));
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (tokens[row] >= 0 && tokens[row] < vocabulary_) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("step: token ", tokens[row], " in row ", row, " is outside the vocabulary of ", vocabulary_));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::kernels
