#include "kernels/api/deep_embed_attention.h"

#include "absl/strings/str_cat.h"
#include "kernels/api/check.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels {
namespace {

constexpr absl::string_view kOp = "deep_embed_attention";
constexpr int64_t kLargestCapacity = int64_t{1} << 24;

// Whether `value` is a whole number in [0, limit]; NaN is not.
bool IsCount(float value, int64_t limit) {
  return value >= 0.0f && value <= static_cast<float>(limit) &&
         value == static_cast<float>(static_cast<int64_t>(value));
}

// The state comes from a snapshot: nothing in it may index outside a cache or a table.
absl::Status CheckCache(const DeepEmbedAttentionArgs& args, const SequenceSpan& span) {
  const float length = *args.length.of(span.slot);
  if (!IsCount(length, args.capacity)) {
    return absl::DataLossError(absl::StrCat(kOp, ": slot ", span.slot, " has a cache of ", length,
                                            " tokens, not a whole number in [0, ", args.capacity, "]"));
  }
  const auto cached = static_cast<int64_t>(length);
  if (span.row_count > args.capacity - cached) {
    return absl::ResourceExhaustedError(absl::StrCat(kOp, ": slot ", span.slot, " has ", cached, " tokens and gets ",
                                                     span.row_count, "; the capacity is ", args.capacity));
  }
  const float* const tokens = args.token_cache.of(span.slot);
  for (int64_t t = 0; t < cached; ++t) {
    if (!IsCount(tokens[t], args.vocabulary - 1)) {
      return absl::DataLossError(absl::StrCat(kOp, ": slot ", span.slot, " has cached token ", tokens[t], " at ", t,
                                              ", not an id in the vocabulary of ", args.vocabulary));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const DeepEmbedAttentionArgs& args) {
  RWKV_RETURN_IF_ERROR(internal::CheckStep(kOp, args.step));
  RWKV_RETURN_IF_ERROR(internal::CheckSizes(kOp, {{"vocabulary", args.vocabulary}, {"capacity", args.capacity}}));
  if (args.capacity > kLargestCapacity || args.vocabulary > kLargestCapacity) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOp, ": capacity ", args.capacity, " or vocabulary ", args.vocabulary, " is more than 2^24"));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckPointers(kOp, {{"k2", args.k2},
                                                     {"v2", args.v2},
                                                     {"k_emb", args.k_emb},
                                                     {"v_emb", args.v_emb},
                                                     {"x_q", args.x_q},
                                                     {"x_k", args.x_k},
                                                     {"x_v", args.x_v},
                                                     {"lnq_weight", args.lnq_weight},
                                                     {"lnq_bias", args.lnq_bias},
                                                     {"lnk_weight", args.lnk_weight},
                                                     {"lnk_bias", args.lnk_bias},
                                                     {"lnv_weight", args.lnv_weight},
                                                     {"lnv_bias", args.lnv_bias},
                                                     {"q", args.q},
                                                     {"key", args.key},
                                                     {"value", args.value},
                                                     {"y", args.y}}));
  RWKV_RETURN_IF_ERROR(internal::CheckEpsilon(kOp, args.epsilon));
  const int64_t rank = args.k2->matrix.cols;
  if (args.v2->matrix.cols != rank) {
    return absl::InvalidArgumentError(absl::StrCat(kOp, ": v2 has ", args.v2->matrix.cols, " inputs, k2 has ", rank));
  }
  RWKV_RETURN_IF_ERROR(internal::CheckState(kOp, "length", args.length, 1));
  RWKV_RETURN_IF_ERROR(internal::CheckState(kOp, "token_cache", args.token_cache, args.capacity));
  RWKV_RETURN_IF_ERROR(internal::CheckState(kOp, "key_cache", args.key_cache, args.capacity * rank));
  RWKV_RETURN_IF_ERROR(internal::CheckState(kOp, "value_cache", args.value_cache, args.capacity * rank));
  return internal::CheckState(kOp, "q_previous", args.q_previous, args.k2->matrix.rows);
}

absl::Status ValidateCaches(const DeepEmbedAttentionArgs& args) {
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    if (args.step->spans[s].slot == kPaddingSlot) continue;
    RWKV_RETURN_IF_ERROR(CheckCache(args, args.step->spans[s]));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::kernels
