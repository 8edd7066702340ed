// Protos as the JSON that --json prints: snake_case, times as seconds, unset left out.
#pragma once

#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"
#include "nlohmann/json.hpp"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"

namespace rwkv::rwkvctl {

using Json = nlohmann::ordered_json;

// One line. What is no number in JSON (a logprob of -inf) becomes null.
std::string DumpLine(const Json& json);
std::string DumpIndented(const Json& json);

double ToSeconds(const google::protobuf::Duration& duration);

// {"index", "id", "text", "logprob", "top_logprobs": [{"id", "logprob"}]}
Json TokenToJson(const v1::GenerateResponse& response);
// {"finish_reason", "prompt_tokens", "generated_tokens", ...}; "text" is what the end set free.
Json FinishToJson(const v1::GenerateResponse& response);
Json SessionToJson(const v1::Session& session);
Json ModelToJson(const v1::ModelInfo& model);

// "length" of FINISH_REASON_LENGTH.
std::string FinishReasonName(v1::FinishReason reason);
// "2026-11-22T06:00:01Z"
std::string FormatTimestamp(const google::protobuf::Timestamp& timestamp);

}  // namespace rwkv::rwkvctl
