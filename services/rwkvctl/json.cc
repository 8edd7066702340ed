#include "services/rwkvctl/json.h"

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"

namespace rwkv::rwkvctl {

std::string DumpLine(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n"; }

std::string DumpIndented(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

double ToSeconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + 1e-9 * duration.nanos();
}

Json TokenToJson(const v1::GenerateResponse& response) {
  Json json = {{"index", response.index()}, {"id", response.token_id()}, {"text", response.text()}};
  if (response.has_logprob()) json["logprob"] = response.logprob();
  if (response.top_logprobs_size() > 0) {
    Json& top = json["top_logprobs"] = Json::array();
    for (const v1::TokenLogprob& entry : response.top_logprobs()) {
      top.push_back({{"id", entry.token_id()}, {"logprob", entry.logprob()}});
    }
  }
  return json;
}

Json FinishToJson(const v1::GenerateResponse& response) {
  const v1::Finish& finish = response.finish();
  Json json = {
      {"finish_reason", FinishReasonName(finish.reason())},
      {"text", response.text()},
      {"prompt_tokens", finish.prompt_tokens()},
      {"generated_tokens", finish.generated_tokens()},
      {"session_tokens", finish.session_tokens()},
      {"reused_tokens", finish.reused_tokens()},
      {"session_id", finish.session_id()},
      {"request_id", finish.request_id()},
      {"seed", finish.seed()},
      {"queue_seconds", ToSeconds(finish.queue_time())},
      {"prefill_seconds", ToSeconds(finish.prefill_time())},
      {"decode_seconds", ToSeconds(finish.decode_time())},
  };
  if (finish.has_stop_token_id()) json["stop_token_id"] = finish.stop_token_id();
  if (!finish.stop_string().empty()) json["stop_string"] = finish.stop_string();
  return json;
}

Json SessionToJson(const v1::Session& session) {
  Json json = {
      {"id", session.id()},
      {"tokens", session.token_count()},
      {"model_fingerprint", session.model_fingerprint()},
      {"create_time", FormatTimestamp(session.create_time())},
      {"update_time", FormatTimestamp(session.update_time())},
  };
  if (!session.forked_from().empty()) {
    json["forked_from"] = session.forked_from();
    json["fork_position"] = session.fork_position();
  }
  if (!session.initial_state().empty()) json["initial_state"] = session.initial_state();
  if (session.has_base_position()) json["base_position"] = session.base_position();
  if (session.log_begin() > 0) json["log_begin"] = session.log_begin();
  if (session.snapshot_positions_size() > 0) {
    json["snapshot_positions"] =
        std::vector<uint64_t>(session.snapshot_positions().begin(), session.snapshot_positions().end());
  }
  if (!session.open_request_id().empty()) json["open_request_id"] = session.open_request_id();
  return json;
}

Json ModelToJson(const v1::ModelInfo& model) {
  return {
      {"name", model.name()},
      {"fingerprint", model.fingerprint()},
      {"version", model.version()},
      {"layer_count", model.layer_count()},
      {"width", model.width()},
      {"head_count", model.head_count()},
      {"head_size", model.head_size()},
      {"ffn_width", model.ffn_width()},
      {"vocab_size", model.vocab_size()},
      {"dtype", model.dtype()},
      {"tokenizer", model.tokenizer()},
      {"parameters", model.parameters()},
      {"initial_states", std::vector<std::string>(model.initial_states().begin(), model.initial_states().end())},
  };
}

std::string FinishReasonName(v1::FinishReason reason) {
  const std::string name = v1::FinishReason_Name(reason);
  return absl::AsciiStrToLower(absl::StripPrefix(name, "FINISH_REASON_"));
}

std::string FormatTimestamp(const google::protobuf::Timestamp& timestamp) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::FromUnixSeconds(timestamp.seconds()), absl::UTCTimeZone());
}

}  // namespace rwkv::rwkvctl
