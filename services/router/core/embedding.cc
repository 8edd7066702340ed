#include "services/router/core/embedding.h"

#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace rwkv::router {
namespace {

constexpr int64_t kMaxStateBytes = 1 << 20;  // As worker.proto has it.

}  // namespace

absl::Status CheckEmbedSource(v1::EmbedSource source, const std::vector<v1::StateTensor>& state_layout) {
  if (source != v1::EMBED_SOURCE_STATE) return absl::OkStatus();
  for (const v1::StateTensor& tensor : state_layout) {
    if (tensor.name() != "att.state") continue;
    int64_t bytes = sizeof(float);
    for (const int64_t size : tensor.shape()) bytes *= size;
    if (bytes <= kMaxStateBytes) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("source: the model's matrix state has ", bytes, " bytes, at most ", kMaxStateBytes, " are sent"));
  }
  return absl::FailedPreconditionError("source: the model has no matrix state (RWKV-4); take a hidden state");
}

void AskForEmbedding(v1::EmbedSource source, bool last, v1::StepEntry* entry) {
  switch (source) {
    case v1::EMBED_SOURCE_HIDDEN_MEAN:
      entry->set_hidden_sum(true);
      return;
    case v1::EMBED_SOURCE_STATE:
      entry->set_wkv_state(last);
      return;
    default:
      entry->set_hidden_last(last);
      return;
  }
}

const std::string& EmbeddingBytes(v1::EmbedSource source, const v1::EntryResult& result) {
  switch (source) {
    case v1::EMBED_SOURCE_HIDDEN_MEAN:
      return result.hidden_sum();
    case v1::EMBED_SOURCE_STATE:
      return result.wkv_state();
    default:
      return result.hidden_last();
  }
}

absl::StatusOr<v1::EmbedResponse> MakeEmbedding(const v1::EmbedRequest& request, absl::string_view bytes,
                                                uint32_t prompt_tokens) {
  if (bytes.empty() || bytes.size() % sizeof(float) != 0) {
    return absl::InternalError(absl::StrCat("the pipeline sent an embedding of ", bytes.size(), " bytes"));
  }
  v1::EmbedResponse response;
  response.set_prompt_tokens(prompt_tokens);
  response.mutable_values()->Resize(static_cast<int>(bytes.size() / sizeof(float)), 0.0f);
  std::memcpy(response.mutable_values()->mutable_data(), bytes.data(), bytes.size());
  if (request.source() == v1::EMBED_SOURCE_HIDDEN_MEAN) {
    for (float& value : *response.mutable_values()) value /= static_cast<float>(prompt_tokens);
  }
  if (request.normalize()) {
    double squares = 0;
    for (const float value : response.values()) squares += static_cast<double>(value) * value;
    if (squares > 0) {
      const double scale = 1 / std::sqrt(squares);
      for (float& value : *response.mutable_values()) value = static_cast<float>(value * scale);
    }
  }
  return response;
}

}  // namespace rwkv::router
