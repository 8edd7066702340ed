#include "services/router/core/turn_input.h"

#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/sampling/sampling_params.h"
#include "services/common/tenant_ids.h"
#include "services/tokenizer/stream_decoder.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {
namespace {

using common::InvalidFieldError;

absl::Status NeedsTokenizer(absl::string_view field, const ServingModel& model) {
  return absl::FailedPreconditionError(
      absl::StrCat(field, ": the model \"", model.info.name(), "\" (", model.info.vocab_size(),
                   " ids) has no known tokenizer: ", model.no_tokenizer, "; send token ids"));
}

absl::Status CheckTokens(absl::string_view field, absl::Span<const uint32_t> ids, const ServingModel& model) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < static_cast<uint32_t>(model.info.vocab_size())) continue;
    return InvalidFieldError(
        absl::StrCat(field, "[", i, "]"),
        absl::StrCat("token id ", ids[i], " is not below the model's vocabulary of ", model.info.vocab_size()));
  }
  return absl::OkStatus();
}

// How many tokens lie whole before each of these offsets in their text.
std::vector<uint64_t> WholeTokens(const std::vector<uint64_t>& offsets, absl::Span<const uint32_t> tokens,
                                  const tokenizer::Tokenizer& tokenizer) {
  std::vector<uint64_t> counts;
  uint64_t bytes = 0;
  size_t whole = 0;
  for (const uint64_t offset : offsets) {
    for (; whole < tokens.size(); ++whole) {
      const uint64_t next = bytes + tokenizer.TokenBytes(tokens[whole]).size();
      if (next > offset) break;
      bytes = next;
    }
    counts.push_back(whole);
  }
  return counts;
}

std::string Offered(const v1::ModelInfo& model) {
  return model.initial_states().empty() ? "none" : absl::StrJoin(model.initial_states(), ", ");
}

}  // namespace

size_t FindInvalidUtf8(absl::string_view text) {
  // Grown in doubling pieces and then bisected would be clever; a decoder pass is linear and short.
  size_t i = 0;
  const auto byte = [&text](size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
  while (i < text.size()) {
    const unsigned lead = byte(i);
    size_t length = 0;
    if (lead < 0x80) {
      length = 1;
    } else if (lead >= 0xc2 && lead <= 0xdf) {
      length = 2;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      length = 3;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      length = 4;
    } else {
      return i;
    }
    if (!tokenizer::IsValidUtf8(text.substr(i, length)) || i + length > text.size()) return i;
    i += length;
  }
  return absl::string_view::npos;
}

absl::Status UnparsableRequest(absl::string_view message_name, absl::string_view text) {
  const size_t offset = FindInvalidUtf8(text);
  if (offset != absl::string_view::npos) {
    return InvalidFieldError("text", absl::StrCat("not valid UTF-8 at byte ", offset));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("the message is not a rwkv.v1.", message_name, ", or one of its strings is not valid UTF-8"));
}

absl::Status CheckSessionId(absl::string_view field, absl::string_view id) {
  if (const common::TenantAndId parts = common::SplitScopedId(id); common::IsTenantName(parts.tenant)) id = parts.id;
  if (id.empty() || id.size() > kMaxIdBytes) {
    return InvalidFieldError(field, absl::StrCat("has ", id.size(), " bytes; 1 to ", kMaxIdBytes, " are allowed"));
  }
  for (size_t i = 0; i < id.size(); ++i) {
    const char c = id[i];
    if (absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-' || c == ':') continue;
    return InvalidFieldError(field, absl::StrCat("byte ", i, " is not one of A-Z a-z 0-9 . _ - :"));
  }
  return absl::OkStatus();
}

absl::Status CheckModel(absl::string_view name, const ServingModel& model) {
  if (name.empty() || name == model.info.name() || name == model.info.fingerprint()) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("no model \"", name.substr(0, kMaxIdBytes),
                                          "\" is served here; the one that is: \"", model.info.name(),
                                          "\" (fingerprint ", model.info.fingerprint(), ")"));
}

absl::StatusOr<std::string> FindInitialState(absl::string_view name, const v1::ModelInfo& model) {
  if (name.empty()) return std::string();
  for (const std::string& id : model.initial_states()) {
    if (id == name || absl::string_view(id).substr(0, id.rfind('@')) == name) return id;
  }
  return absl::NotFoundError(absl::StrCat("initial_state: the model \"", model.name(), "\" has no tuned state \"",
                                          absl::CHexEscape(name.substr(0, kMaxIdBytes)),
                                          "\"; those it has: ", Offered(model)));
}

absl::Status CheckOffered(absl::string_view initial_state, const v1::ModelInfo& model) {
  const auto& ids = model.initial_states();
  if (initial_state.empty() || std::find(ids.begin(), ids.end(), initial_state) != ids.end()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("it began with the tuned state \"", initial_state,
                                                    "\", which the model \"", model.name(),
                                                    "\" does not offer any more; those it has: ", Offered(model)));
}

absl::Status CheckRequest(const v1::GenerateRequest& request) {
  if (!request.session_id().empty()) RWKV_RETURN_IF_ERROR(CheckSessionId("session_id", request.session_id()));
  if (request.request_id().size() > kMaxIdBytes) {
    return InvalidFieldError("request_id",
                             absl::StrCat("has ", request.request_id().size(), " bytes; at most ", kMaxIdBytes));
  }
  if (!request.request_id().empty() && request.session_id().empty()) {
    return InvalidFieldError("request_id", "needs a session_id");
  }
  if (request.resume_from() > 0 && request.request_id().empty()) {
    return InvalidFieldError("resume_from", "needs a request_id");
  }
  switch (request.input_case()) {
    case v1::GenerateRequest::kText:
      if (request.text().empty()) return InvalidFieldError("text", "is empty");
      if (const size_t at = FindInvalidUtf8(request.text()); at != absl::string_view::npos) {
        return InvalidFieldError("text", absl::StrCat("not valid UTF-8 at byte ", at));
      }
      break;
    case v1::GenerateRequest::kTokens:
      if (request.tokens().ids().empty()) return InvalidFieldError("tokens.ids", "is empty");
      break;
    case v1::GenerateRequest::INPUT_NOT_SET:
      if (request.session_id().empty()) {
        return InvalidFieldError("input", "is missing: give text or tokens, or a session to go on from");
      }
      if (request.has_max_tokens() && request.max_tokens() == 0) {
        return InvalidFieldError("max_tokens", "0 without input: there is nothing to do");
      }
  }
  if (request.prefix_ends_size() > kMaxPrefixEnds) {
    return InvalidFieldError("prefix_ends", absl::StrCat(request.prefix_ends_size(), "; at most ", kMaxPrefixEnds));
  }
  for (int i = 0; i < request.prefix_ends_size(); ++i) {
    const size_t input = request.has_text() ? request.text().size() : static_cast<size_t>(request.tokens().ids_size());
    const uint32_t end = request.prefix_ends(i);
    if (end > (i == 0 ? 0 : request.prefix_ends(i - 1)) && end <= input) continue;
    return InvalidFieldError(absl::StrCat("prefix_ends[", i, "]"),
                             absl::StrCat(end, "; they ascend from 1, and the input has ", input,
                                          request.has_text() ? " bytes" : " tokens"));
  }
  if (request.stop_size() > kMaxStopStrings) {
    return InvalidFieldError("stop", absl::StrCat(request.stop_size(), " strings; at most ", kMaxStopStrings));
  }
  for (int i = 0; i < request.stop_size(); ++i) {
    if (request.stop(i).empty() || request.stop(i).size() > kMaxStopBytes) {
      return InvalidFieldError(
          absl::StrCat("stop[", i, "]"),
          absl::StrCat("has ", request.stop(i).size(), " bytes; 1 to ", kMaxStopBytes, " are allowed"));
    }
  }
  if (request.stop_token_ids_size() > kMaxStopTokenIds) {
    return InvalidFieldError("stop_token_ids",
                             absl::StrCat(request.stop_token_ids_size(), " ids; at most ", kMaxStopTokenIds));
  }
  return absl::OkStatus();
}

absl::Status CheckContext(absl::string_view input_field, uint64_t position, uint64_t input, uint64_t generated,
                          const v1::ModelInfo& model) {
  const uint64_t limit = model.max_context_tokens();
  if (limit == 0) return absl::OkStatus();
  const std::string after = position == 0 ? "" : absl::StrCat(" after the session's ", position);
  if (position > limit || input > limit - position) {
    return InvalidFieldError(input_field, absl::StrCat(input, " tokens", after, " pass the model's context of ", limit,
                                                       " tokens (--deep_embed_context of its workers)"));
  }
  const uint64_t left = limit - position - input;
  if (generated > left) {
    return InvalidFieldError("max_tokens", absl::StrCat(generated, "; ", input, " tokens of input", after, " leave ",
                                                        left, " of the model's context of ", limit,
                                                        " tokens (--deep_embed_context of its workers)"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint32_t>> MakeTokens(const std::string* text, const v1::TokenList* tokens,
                                                 const ServingModel& model, const InputLimits& limits,
                                                 bool plain_text) {
  std::vector<uint32_t> ids;
  if (text != nullptr) {
    if (text->empty()) return InvalidFieldError("text", "is empty");
    if (const size_t at = FindInvalidUtf8(*text); at != absl::string_view::npos) {
      return InvalidFieldError("text", absl::StrCat("not valid UTF-8 at byte ", at));
    }
    if (model.tokenizer == nullptr) return NeedsTokenizer("text", model);
    ids = plain_text ? model.tokenizer->EncodePlain(*text) : model.tokenizer->Encode(*text);
  } else if (tokens != nullptr) {
    ids.assign(tokens->ids().begin(), tokens->ids().end());
    if (ids.empty()) return InvalidFieldError("tokens.ids", "is empty");
  } else {
    return InvalidFieldError("input", "is missing: give text or tokens");
  }
  const absl::string_view field = text != nullptr ? "text" : "tokens.ids";
  if (static_cast<int64_t>(ids.size()) > limits.max_prompt_tokens) {
    return InvalidFieldError(field,
                             absl::StrCat(ids.size(), " tokens; at most ", limits.max_prompt_tokens, " are allowed"));
  }
  RWKV_RETURN_IF_ERROR(CheckTokens(field, ids, model));
  return ids;
}

absl::StatusOr<std::vector<uint32_t>> MakeDocumentTokens(const Document& document, const ServingModel& model,
                                                         const InputLimits& limits) {
  RWKV_RETURN_IF_ERROR(CheckModel(document.model, model));
  if (document.Bytes() > limits.max_document_bytes) return DocumentTooLarge(limits);
  RWKV_RETURN_IF_ERROR(CheckTokens("token_ids", document.token_ids, model));
  std::vector<uint32_t> ids = document.token_ids;
  if (!document.text.empty()) {
    if (model.tokenizer == nullptr) return NeedsTokenizer("text", model);
    const std::vector<uint32_t> text_ids = model.tokenizer->Encode(document.text);
    RWKV_RETURN_IF_ERROR(CheckTokens("text", text_ids, model));
    ids.insert(ids.end(), text_ids.begin(), text_ids.end());
  }
  if (ids.empty()) return InvalidFieldError("text", "the document is empty");
  return ids;
}

absl::Status DocumentTooLarge(const InputLimits& limits) {
  return absl::ResourceExhaustedError(absl::StrCat("the document has more than the ", limits.max_document_bytes,
                                                   " bytes that this router allows (--max_document_bytes)"));
}

absl::StatusOr<TurnInput> MakeTurnInput(const v1::GenerateRequest& request, const ServingModel& model,
                                        const InputLimits& limits, uint64_t drawn_seed) {
  RWKV_RETURN_IF_ERROR(CheckRequest(request));
  RWKV_RETURN_IF_ERROR(CheckModel(request.model(), model));
  TurnInput input;
  input.session_id = request.session_id();
  input.request_id = request.request_id();
  input.resume_from = request.resume_from();
  RWKV_ASSIGN_OR_RETURN(input.initial_state, FindInitialState(request.initial_state(), model.info));
  input.input_field = request.has_text() ? "text" : request.has_tokens() ? "tokens.ids" : "input";
  if (request.input_case() != v1::GenerateRequest::INPUT_NOT_SET) {
    RWKV_ASSIGN_OR_RETURN(input.tokens, MakeTokens(request.has_text() ? &request.text() : nullptr,
                                                   request.has_tokens() ? &request.tokens() : nullptr, model, limits,
                                                   request.plain_text()));
  }
  input.prefix_ends.assign(request.prefix_ends().begin(), request.prefix_ends().end());
  if (request.has_text()) input.prefix_ends = WholeTokens(input.prefix_ends, input.tokens, *model.tokenizer);
  if (request.stop_size() > 0 && model.tokenizer == nullptr) return NeedsTokenizer("stop", model);
  const std::vector<uint32_t> stop_ids(request.stop_token_ids().begin(), request.stop_token_ids().end());
  RWKV_RETURN_IF_ERROR(CheckTokens("stop_token_ids", stop_ids, model));
  const uint32_t max_tokens = request.has_max_tokens() ? request.max_tokens() : kDefaultMaxTokens;
  if (max_tokens > limits.max_generated_tokens) {
    return InvalidFieldError("max_tokens",
                             absl::StrCat(max_tokens, "; at most ", limits.max_generated_tokens, " are allowed"));
  }
  RWKV_RETURN_IF_ERROR(CheckContext(input.input_field, 0, input.tokens.size(), max_tokens, model.info));
  const absl::StatusOr<common::SamplingParams> sampling =
      common::SamplingParams::Create(request.sampling(), model.info.vocab_size(), model.banned_token_ids);
  if (!sampling.ok()) return sampling.status();

  input.spec.set_max_tokens(max_tokens);
  *input.spec.mutable_sampling() = common::CompleteSampling(request.sampling(), drawn_seed);
  input.spec.set_seed_drawn(!request.sampling().has_seed());
  *input.spec.mutable_stop() = request.stop();
  std::vector<uint32_t> sorted = stop_ids;
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  input.spec.mutable_stop_token_ids()->Add(sorted.begin(), sorted.end());
  input.spec.set_ignore_end_of_text(request.ignore_end_of_text());
  return input;
}

absl::Status CheckSameSpec(const v1::TurnSpec& stored, const v1::TurnSpec& spec) {
  v1::TurnSpec wanted = spec;
  if (stored.seed_drawn() && spec.seed_drawn()) wanted.mutable_sampling()->set_seed(stored.sampling().seed());
  wanted.set_numeric_family(stored.numeric_family());
  if (stored.has_counts_from()) wanted.set_counts_from(stored.counts_from());
  if (google::protobuf::util::MessageDifferencer::Equals(stored, wanted)) return absl::OkStatus();
  return InvalidFieldError("request_id", "names a turn with other limits, stops or sampling");
}

}  // namespace rwkv::router
