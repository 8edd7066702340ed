// What Embed asks of the last stage, and what it makes of the answer. Pure functions.
//   HIDDEN_LAST: h[T-1]
//   HIDDEN_MEAN: (h[0] + ... + h[T-1]) / T
//   STATE:       the last layer's matrix state after token T-1
// h[t] = LN(x[t]; ln_out) [D], what the head turns into logits. The sum is the worker's, in fp32 and token order, so
// that an embedding depends neither on chunks nor on company.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::router {

// kFailedPrecondition: STATE, and the model has no matrix state (RWKV-4), or one too large for a message.
absl::Status CheckEmbedSource(v1::EmbedSource source, const std::vector<v1::StateTensor>& state_layout);

// Sets what the entry has to return; `last`: its last token is the input's.
void AskForEmbedding(v1::EmbedSource source, bool last, v1::StepEntry* entry);

// What such an entry has returned: fp32, little-endian. Empty: nothing.
const std::string& EmbeddingBytes(v1::EmbedSource source, const v1::EntryResult& result);

// The answer from the bytes of the last entry. kInternal: they are no floats.
absl::StatusOr<v1::EmbedResponse> MakeEmbedding(const v1::EmbedRequest& request, absl::string_view bytes,
                                                uint32_t prompt_tokens);

}  // namespace rwkv::router
