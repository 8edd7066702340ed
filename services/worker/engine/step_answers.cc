#include "services/worker/engine/step_answers.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/dtype.h"
#include "kernels/base/finite.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/worker/engine/device_draws.h"
#include "services/worker/sampler/row_math.h"

namespace rwkv::worker {
namespace {

constexpr int64_t kLogitsMessageBytes = 1 << 20;
constexpr int64_t kMaxMatrixBytes = 1 << 20;

absl::Status NotFinite(const v1::StepEntry& entry, int64_t row) {
  return absl::InternalError(absl::StrCat("slot ", entry.slot(), ": the model's logits after position ",
                                          entry.expected_position() + row, " are not finite"));
}

}  // namespace

bool IsBroken(const float* logits, int64_t count) { return std::isnan(MaxLogit(logits, static_cast<size_t>(count))); }

StepAnswers::StepAnswers(int64_t width, int64_t vocab_size, const StateLayout& layout, int threads)
    : width_(width), vocab_size_(vocab_size), layout_(layout), samplers_(static_cast<size_t>(threads)) {}

bool StepAnswers::OnlyDraws(const v1::StepEntry& entry) {
  return entry.sample() && !entry.logits() && entry.score_token_ids_size() == 0;
}

EntryNumbers StepAnswers::Needs(const v1::StepEntry& entry) {
  const int64_t count = entry.token_ids_size();
  // Scores need the rows before the scored tokens, a draw the last row, logits all; together they have no gap.
  const bool all = entry.logits() || entry.score_token_ids_size() == count;
  EntryNumbers numbers;
  numbers.logit_row_begin = all || entry.score_token_ids_size() > 0 ? 0 : count - 1;
  numbers.logit_row_end = all || entry.sample() ? count : entry.score_token_ids_size();
  numbers.logit_row_end = std::max(numbers.logit_row_end, numbers.logit_row_begin);
  numbers.hidden_rows = entry.hidden_sum() ? count : entry.hidden_last() ? 1 : 0;
  return numbers;
}

absl::Status StepAnswers::CheckMatrix(int slot) const {
  if (layout_.matrix() < 0) {
    return absl::FailedPreconditionError(absl::StrCat("slot ", slot, ": the model has no matrix state"));
  }
  const int64_t bytes = layout_.tensors()[layout_.matrix()].size() * static_cast<int64_t>(sizeof(float));
  if (bytes > kMaxMatrixBytes) {
    return absl::FailedPreconditionError(absl::StrCat("slot ", slot, ": the matrix state has ", bytes,
                                                      " bytes, at most ", kMaxMatrixBytes, " are sent"));
  }
  return absl::OkStatus();
}

bool StepAnswers::Answer(uint64_t step_id, const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn,
                         int thread, std::vector<v1::LogitsRows>& logits, v1::EntryResult& result) {
  const absl::Status status = Fill(step_id, entry, numbers, turn, thread, logits, result);
  *result.mutable_status() = common::ToStatusProto(status);
  if (status.ok()) return true;
  result.clear_token_id();
  result.clear_logprob();
  result.clear_top_logprobs();
  result.clear_scores();
  result.clear_hidden_sum();
  result.clear_hidden_last();
  return false;
}

absl::Status StepAnswers::Fill(uint64_t step_id, const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn,
                               int thread, std::vector<v1::LogitsRows>& logits, v1::EntryResult& result) {
  const auto row_at = [this, &numbers](int64_t row) {
    return numbers.logits + (row - numbers.logit_row_begin) * vocab_size_;
  };
  const int64_t count = entry.token_ids_size();
  for (int64_t row = numbers.logit_row_begin; numbers.drawn == nullptr && row < numbers.logit_row_end; ++row) {
    if (IsBroken(row_at(row), vocab_size_)) return NotFinite(entry, row);
  }
  for (int i = 0; i < entry.score_token_ids_size(); ++i) {
    RWKV_ASSIGN_OR_RETURN(const float logprob,
                          Sampler::Logprob(absl::MakeConstSpan(row_at(i), vocab_size_), entry.score_token_ids(i)));
    result.add_scores(logprob);
  }
  if (entry.sample()) {
    RWKV_ASSIGN_OR_RETURN(const SampledToken sampled, Draw(entry, numbers, turn, thread));
    result.set_token_id(sampled.token);
    result.set_logprob(sampled.logprob);
    for (const LogprobOf& top : sampled.top_logprobs) {
      v1::TokenLogprob& out = *result.add_top_logprobs();
      out.set_token_id(top.token);
      out.set_logprob(top.logprob);
    }
  }
  if (entry.logits()) {
    const int64_t row_bytes = vocab_size_ * static_cast<int64_t>(sizeof(float));
    const int64_t rows_per_message = std::max<int64_t>(1, kLogitsMessageBytes / row_bytes);
    for (int64_t row = 0; row < count; row += rows_per_message) {
      const int64_t rows = std::min(rows_per_message, count - row);
      v1::LogitsRows message;
      message.set_step_id(step_id);
      message.set_sequence(entry.sequence());
      message.set_first_position(entry.expected_position() + row);
      message.set_rows(static_cast<uint32_t>(rows));
      message.set_logits(row_at(row), rows * row_bytes);
      logits.push_back(std::move(message));
    }
  }
  RWKV_RETURN_IF_ERROR(FillHidden(entry, numbers, turn, result));
  if (!entry.wkv_state()) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(CheckMatrix(entry.slot()));
  result.set_wkv_state(numbers.matrix, layout_.tensors()[layout_.matrix()].size() * sizeof(float));
  return absl::OkStatus();
}

absl::StatusOr<SampledToken> StepAnswers::Draw(const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn,
                                               int thread) {
  const int64_t count = entry.token_ids_size();
  if (numbers.drawn == nullptr) {
    const float* const row = numbers.logits + (count - 1 - numbers.logit_row_begin) * vocab_size_;
    return samplers_[thread].Sample(absl::MakeConstSpan(row, vocab_size_), turn.sampling,
                                    entry.expected_position() + count, turn.penalties);
  }
  if (numbers.drawn->status == kernels::SampleStatus::kNotFinite) return NotFinite(entry, count - 1);
  RWKV_ASSIGN_OR_RETURN(SampledToken sampled, ToSampledToken(*numbers.drawn));
  turn.penalties.Count(turn.sampling, sampled.token);
  return sampled;
}

absl::Status StepAnswers::FillHidden(const v1::StepEntry& entry, const EntryNumbers& numbers, Turn& turn,
                                     v1::EntryResult& result) const {
  if (kernels::FindNotFinite(kernels::DType::kFloat32, numbers.hidden, numbers.hidden_rows * width_) >= 0) {
    return absl::InternalError(absl::StrCat("slot ", entry.slot(), ": a final hidden state is not finite"));
  }
  const size_t bytes = width_ * sizeof(float);
  if (entry.hidden_sum()) {
    turn.hidden_sum.resize(width_, 0.0f);
    for (int64_t row = 0; row < numbers.hidden_rows; ++row) {
      for (int64_t c = 0; c < width_; ++c) turn.hidden_sum[c] += numbers.hidden[row * width_ + c];
    }
    result.set_hidden_sum(turn.hidden_sum.data(), bytes);
  }
  if (entry.hidden_last()) result.set_hidden_last(numbers.hidden + (numbers.hidden_rows - 1) * width_, bytes);
  return absl::OkStatus();
}

}  // namespace rwkv::worker
