#include "services/rwkvctl/eval_tokens.h"

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "services/common/grpc_status.h"

namespace rwkv::rwkvctl {
namespace {

constexpr absl::Duration kPatience = absl::Minutes(1);

absl::Status CallPatiently(absl::FunctionRef<absl::Status()> call) {
  const absl::Time give_up = absl::Now() + kPatience;
  for (;;) {
    absl::Status status = call();
    const absl::optional<absl::Duration> delay = common::GetRetryDelay(status);
    if (!delay.has_value() || absl::Now() + *delay > give_up) return status;
    absl::SleepFor(*delay);
  }
}

}  // namespace

absl::StatusOr<TokenIds> EncodeText(const EvalModel& model, absl::string_view text) {
  v1::TokenizeRequest request;
  request.set_data(std::string(text));
  TokenIds tokens;
  absl::Status status = CallPatiently([&] {
    absl::StatusOr<v1::TokenizeResponse> response = model.client.Tokenize(request);
    if (response.ok()) tokens.assign(response->token_ids().begin(), response->token_ids().end());
    return response.status();
  });
  if (!status.ok()) return status;
  return tokens;
}

absl::StatusOr<TokenIds> EncodeDocument(const EvalModel& model, absl::string_view text) {
  absl::StatusOr<TokenIds> tokens;
  CallPatiently([&] {
    tokens = model.client.TokenizeDocument(text);
    return tokens.status();
  }).IgnoreError();  // `tokens` has it.
  return tokens;
}

absl::StatusOr<std::vector<float>> ScoreTokens(const EvalModel& model, const TokenIds& tokens, size_t begin) {
  v1::ScoreRequest request;
  request.set_initial_state(model.initial_state);
  request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
  std::vector<float> logprobs;
  absl::Status status = CallPatiently([&] {
    absl::StatusOr<v1::ScoreResponse> response = model.client.Score(request);
    if (response.ok()) logprobs.assign(response->logprobs().begin() + begin - 1, response->logprobs().end());
    return response.status();
  });
  if (!status.ok()) return status;
  return logprobs;
}

absl::StatusOr<std::vector<float>> ScoreDocument(const EvalModel& model, const TokenIds& tokens) {
  v1::ScoreDocumentRequest document;
  document.set_initial_state(model.initial_state);
  document.mutable_token_ids()->Add(tokens.begin(), tokens.end());
  std::vector<float> logprobs;
  absl::Status status = CallPatiently([&] {
    logprobs.clear();
    return model.client.ScoreDocument(document, [&](const v1::ScoreDocumentResponse& response) {
      logprobs.insert(logprobs.end(), response.logprobs().begin(), response.logprobs().end());
      return absl::OkStatus();
    });
  });
  if (!status.ok()) return status;
  return logprobs;
}

absl::StatusOr<std::vector<v1::GenerateResponse>> ContinueGreedily(const EvalModel& model, const TokenIds& tokens,
                                                                   uint32_t count) {
  v1::GenerateRequest request;
  request.set_initial_state(model.initial_state);
  request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
  request.set_max_tokens(count);
  request.set_ignore_end_of_text(true);
  std::vector<v1::GenerateResponse> answer;
  absl::Status status = CallPatiently([&] {
    answer.clear();
    return model.client.Generate(request, [&](const v1::GenerateResponse& response) {
      answer.push_back(response);
      return absl::OkStatus();
    });
  });
  if (!status.ok()) return status;
  answer.pop_back();  // The finish; its text ends a character that is not whole.
  return answer;
}

}  // namespace rwkv::rwkvctl
