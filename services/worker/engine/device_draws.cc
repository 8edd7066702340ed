#include "services/worker/engine/device_draws.h"

#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/worker/sampler/philox.h"

namespace rwkv::worker {

using kernels::DeviceArray;
using kernels::MemoryKind;
using kernels::SampleEdit;
using kernels::SampleResult;
using kernels::SampleRow;
using kernels::SampleStatus;

static_assert(SamplingParams::kMaxTopLogprobs == kernels::kMaxSampleLogprobs);

absl::StatusOr<DeviceDraws> DeviceDraws::Create(kernels::Device& device, int64_t rows) {
  DeviceDraws draws;
  RWKV_ASSIGN_OR_RETURN(draws.rows_, DeviceArray<SampleRow>::Create(device, rows, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(draws.edits_, DeviceArray<SampleEdit>::Create(device, kMaxEdits, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(draws.results_, DeviceArray<SampleResult>::Create(device, rows, MemoryKind::kPinned));
  return draws;
}

int DeviceDraws::Add(const Turn& turn, uint64_t position, int64_t logits_row) {
  const SamplingParams& params = turn.sampling;
  const PenaltyState& penalties = turn.penalties;
  const size_t edits = params.logit_bias().size() + penalties.seen().size() + params.banned().size();
  if (count_ >= rows_.size() || edits > static_cast<size_t>(kMaxEdits - edit_count_)) return -1;
  SampleRow row;
  row.row = logits_row;
  row.temperature = params.temperature();
  row.top_p = params.top_p();
  row.typical_p = params.typical_p();
  row.min_p = params.min_p();
  row.top_k = params.top_k();
  row.repetition_penalty = params.repetition_penalty();
  row.temperature_last = params.order() == SamplingParams::Order::kRwkvPip;
  row.top_logprobs = static_cast<int32_t>(params.top_logprobs());
  row.random = PhiloxBits(params.seed(), position);
  SampleEdit* const all = edits_.data();
  row.biases = edit_count_;
  for (const auto& [id, bias] : params.logit_bias()) all[edit_count_++] = {id, 0, static_cast<double>(bias)};
  row.seen = edit_count_;
  for (size_t place = 0; place < penalties.seen().size(); ++place) {
    const double penalty = PenaltyOf(params, penalties.count(place));
    all[edit_count_++] = {penalties.seen()[place], 0, penalty};
  }
  row.banned = edit_count_;
  for (const SamplingParams::IdRange& range : params.banned()) all[edit_count_++] = {range.begin, range.end, 0};
  row.end = edit_count_;
  rows_.data()[count_] = row;
  return count_++;
}

absl::Status DeviceDraws::Enqueue(kernels::SampleOp* sample, int64_t vocab, const float* logits, float* adjusted,
                                  kernels::Stream& stream) const {
  if (count_ == 0) return absl::OkStatus();
  kernels::SampleArgs args;
  args.count = count_;
  args.vocab = vocab;
  args.logits = logits;
  args.rows = rows_.data();
  args.edits = edits_.data();
  args.adjusted = adjusted;
  args.results = results_.data();
  return sample(args, stream);
}

absl::StatusOr<SampledToken> ToSampledToken(const SampleResult& result) {
  switch (result.status) {
    case SampleStatus::kDrawn: {
      SampledToken sampled;
      sampled.token = result.token;
      sampled.logprob = result.logprob;
      sampled.top_logprobs.reserve(static_cast<size_t>(result.top_count));
      for (int32_t i = 0; i < result.top_count; ++i) {
        sampled.top_logprobs.push_back({result.top[i].token, result.top[i].logprob});
      }
      return sampled;
    }
    case SampleStatus::kNotFinite:
      return absl::InternalError("sampler: a logit is NaN or +inf");
    case SampleStatus::kNoLogit:
      return absl::InternalError("sampler: every logit is -inf");
    case SampleStatus::kOutOfRange:
      return absl::InternalError("sampler: a penalty takes a logit out of range");
    case SampleStatus::kNoToken:
      return absl::InternalError("sampler: every token is banned or at -inf");
  }
  return absl::InternalError(absl::StrCat("sampler: the device says ", static_cast<int>(result.status)));
}

}  // namespace rwkv::worker
