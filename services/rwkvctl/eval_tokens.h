// What the measures of `eval` share: texts as tokens, and what the model says next. Thread-safe. A call that is refused
// with a time to come back (no room, no pipeline just now) is made again for up to a minute before its error is
// returned.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/client/router_client.h"

namespace rwkv::rwkvctl {

using TokenIds = std::vector<uint32_t>;

// What is measured: the model that a router serves, as it begins or from one of its tuned states.
struct EvalModel {
  EvalModel(router::RouterClient& client, std::string initial_state = "")  // NOLINT: a client alone is one.
      : client(client), initial_state(std::move(initial_state)) {}

  router::RouterClient& client;  // Outlives it.
  std::string initial_state;     // Empty: the model's own.
};

// kFailedPrecondition: the model has no known tokenizer. At most 1 MiB a call, as the router takes it.
absl::StatusOr<TokenIds> EncodeText(const EvalModel& model, absl::string_view text);
// The same for a text up to the router's --max_document_bytes; it is not empty.
absl::StatusOr<TokenIds> EncodeDocument(const EvalModel& model, absl::string_view text);

// The log-probability of each of tokens[begin ..], given all before it; begin >= 1. As long as a prompt may be.
absl::StatusOr<std::vector<float>> ScoreTokens(const EvalModel& model, const TokenIds& tokens, size_t begin);
// The log-probability of each of tokens[1 ..]. As long as a document may be.
absl::StatusOr<std::vector<float>> ScoreDocument(const EvalModel& model, const TokenIds& tokens);

// The `count` likeliest tokens after `tokens`, each after the ones before it (greedy), with text and logprobs.
absl::StatusOr<std::vector<v1::GenerateResponse>> ContinueGreedily(const EvalModel& model, const TokenIds& tokens,
                                                                   uint32_t count);

}  // namespace rwkv::rwkvctl
