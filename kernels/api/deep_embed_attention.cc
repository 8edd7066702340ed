#include "kernels/api/deep_embed_attention.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

constexpr absl::string_view kOp = "deep_embed_attention";
constexpr int64_t kLargestCapacity = int64_t{1} << 24;

absl::Status CheckShape(absl::string_view name, const MatrixView& matrix, int64_t rows, int64_t cols) {
  RWKV_RETURN_IF_ERROR(internal::CheckMatrix(kOp, name, matrix));
  if (matrix.rows == rows && matrix.cols == cols) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(kOp, ": ", name, " is [", matrix.rows, ", ", matrix.cols, "], expected [", rows, ", ", cols, "]"));
}

// Whether `value` is a whole number in [0, limit]; NaN is not.
bool IsCount(float value, int64_t limit) {
  return value >= 0.0f && value <= static_cast<float>(limit) &&
         value == static_cast<float>(static_cast<int64_t>(value));
}

// The state comes from a snapshot: nothing in it may index outside a cache or a table.
absl::Status CheckCache(const DeepEmbedAttentionArgs& args, const SequenceSpan& span) {
  const float length = args.length.data[span.slot * args.length.stride];
  if (!IsCount(length, args.capacity)) {
    return absl::DataLossError(absl::StrCat(kOp, ": slot ", span.slot, " has a cache of ", length,
                                            " tokens, not a whole number in [0, ", args.capacity, "]"));
  }
  const auto cached = static_cast<int64_t>(length);
  if (span.row_count > args.capacity - cached) {
    return absl::ResourceExhaustedError(absl::StrCat(kOp, ": slot ", span.slot, " has ", cached, " tokens and gets ",
                                                     span.row_count, "; the capacity is ", args.capacity));
  }
  const float* const tokens = args.token_cache.data + span.slot * args.token_cache.stride;
  for (int64_t t = 0; t < cached; ++t) {
    if (!IsCount(tokens[t], args.k_emb.rows - 1)) {
      return absl::DataLossError(absl::StrCat(kOp, ": slot ", span.slot, " has cached token ", tokens[t], " at ", t,
                                              ", not an id in the vocabulary of ", args.k_emb.rows));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const DeepEmbedAttentionArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(kOp, {{"capacity", args.capacity}}));
  if (args.capacity > kLargestCapacity) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": capacity is ", args.capacity, ", more than 2^24"));
  }
  const int64_t query_width = args.k2.rows;
  const int64_t rank = args.k2.cols;
  const int64_t width = args.v2.rows;
  const int64_t vocabulary = args.k_emb.rows;
  RWKV_RETURN_IF_ERROR(CheckShape("k2", args.k2, query_width, rank));
  RWKV_RETURN_IF_ERROR(CheckShape("v2", args.v2, width, rank));
  RWKV_RETURN_IF_ERROR(CheckShape("k_emb", args.k_emb, vocabulary, query_width));
  RWKV_RETURN_IF_ERROR(CheckShape("v_emb", args.v_emb, vocabulary, width));
  // So that a float holds every id exactly.
  if (vocabulary > kLargestCapacity) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": a vocabulary of ", vocabulary, ", more than 2^24"));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"x_q", args.x_q},
                                                     {"x_k", args.x_k},
                                                     {"x_v", args.x_v},
                                                     {"lnq_weight", args.lnq_weight},
                                                     {"lnq_bias", args.lnq_bias},
                                                     {"lnk_weight", args.lnk_weight},
                                                     {"lnk_bias", args.lnk_bias},
                                                     {"lnv_weight", args.lnv_weight},
                                                     {"lnv_bias", args.lnv_bias},
                                                     {"tokens", args.tokens},
                                                     {"q", args.q},
                                                     {"key", args.key},
                                                     {"value", args.value},
                                                     {"y", args.y}}));
  RWKV_RETURN_IF_ERROR(internal::CheckEpsilon(kOp, args.epsilon));
  RWKV_RETURN_IF_ERROR(internal::CheckSpans(kOp, args.spans, args.span_count, args.rows, args.state_slots));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool(kOp, "length", args.length, 1));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool(kOp, "token_cache", args.token_cache, args.capacity));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool(kOp, "key_cache", args.key_cache, args.capacity * rank));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool(kOp, "value_cache", args.value_cache, args.capacity * rank));
  RWKV_RETURN_IF_ERROR(internal::CheckStatePool(kOp, "q_previous", args.q_previous, query_width));
  RWKV_RETURN_IF_ERROR(internal::CheckTokens(kOp, args.tokens, args.rows, vocabulary));
  for (int64_t s = 0; s < args.span_count; ++s) RWKV_RETURN_IF_ERROR(CheckCache(args, args.spans[s]));
  return absl::OkStatus();
}

}  // namespace rwkv::kernels
