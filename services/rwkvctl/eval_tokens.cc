#include "services/rwkvctl/eval_tokens.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace rwkv::rwkvctl {

absl::StatusOr<TokenIds> EncodeText(router::RouterClient& client, absl::string_view text) {
  v1::TokenizeRequest request;
  request.set_data(std::string(text));
  absl::StatusOr<v1::TokenizeResponse> response = client.Tokenize(request);
  if (!response.ok()) return response.status();
  return TokenIds(response->token_ids().begin(), response->token_ids().end());
}

absl::StatusOr<std::vector<float>> ScoreTokens(router::RouterClient& client, const TokenIds& tokens, size_t begin) {
  v1::ScoreDocumentRequest document;
  document.mutable_token_ids()->Add(tokens.begin(), tokens.end());
  std::vector<float> logprobs;
  absl::Status status = client.ScoreDocument(document, [&](const v1::ScoreDocumentResponse& response) {
    for (int i = 0; i < response.logprobs_size(); ++i) {
      if (response.first() + i >= begin) logprobs.push_back(response.logprobs(i));
    }
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return logprobs;
}

absl::StatusOr<std::vector<v1::GenerateResponse>> ContinueGreedily(router::RouterClient& client, const TokenIds& tokens,
                                                                   uint32_t count) {
  v1::GenerateRequest request;
  request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
  request.set_max_tokens(count);
  request.set_ignore_end_of_text(true);
  std::vector<v1::GenerateResponse> answer;
  absl::Status status = client.Generate(request, [&](const v1::GenerateResponse& response) {
    answer.push_back(response);
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  answer.pop_back();  // The finish; its text ends a character that is not whole.
  return answer;
}

}  // namespace rwkv::rwkvctl
