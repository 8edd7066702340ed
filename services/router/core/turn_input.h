// A GenerateRequest, checked field by field and put into the form in which the log keeps it. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/router/core/serving_model.h"

namespace rwkv::router {

struct InputLimits {
  int64_t max_prompt_tokens = 65536;
  // Of ScoreDocument: bytes of text and 4 a token id. Kept in memory while it is scored, with 4 bytes a token.
  int64_t max_document_bytes = 16 << 20;
  uint32_t max_generated_tokens = 1 << 19;  // A turn comes back from the log as one message, with 4 bytes a token.
};

inline constexpr uint32_t kDefaultMaxTokens = 256;
inline constexpr int kMaxStopStrings = 16;
inline constexpr size_t kMaxStopBytes = 256;
inline constexpr int kMaxStopTokenIds = 64;
inline constexpr size_t kMaxIdBytes = 128;
inline constexpr int kMaxPrefixEnds = 16;

struct TurnInput {
  std::string session_id;        // Empty: none.
  std::string request_id;        // Empty: none was given.
  std::vector<uint32_t> tokens;  // Empty only with a session: to go on from what it has.
  std::string input_field;       // Where they came from: "text", "tokens.ids", or "input" if there are none.
  v1::TurnSpec spec;
  uint64_t resume_from = 0;
  std::string initial_state;          // In full; empty: none was named.
  std::vector<uint64_t> prefix_ends;  // In tokens, ascending.
};

// What can be said without knowing the model. kInvalidArgument names the field.
absl::Status CheckRequest(const v1::GenerateRequest& request);

// CheckRequest() and the rest. `drawn_seed` is used if the request names none.
//   kInvalidArgument: a field is wrong (BadRequest names it).  kNotFound: another model, or no such tuned state.
//   kFailedPrecondition: it takes a tokenizer and the model has none.
absl::StatusOr<TurnInput> MakeTurnInput(const v1::GenerateRequest& request, const ServingModel& model,
                                        const InputLimits& limits, uint64_t drawn_seed);

// Whether a turn of `input` tokens (in the field `input_field`) and `generated` more fits behind `position` tokens.
// kInvalidArgument that names the field: the model takes no more than max_context_tokens.
absl::Status CheckContext(absl::string_view input_field, uint64_t position, uint64_t input, uint64_t generated,
                          const v1::ModelInfo& model);

// kInvalidArgument unless `stored`, the spec of a turn in the log, is what `spec` asks for again. A seed that was drawn
// is not compared, nor what the penalties of a continuation count, nor the numeric family: the log says them.
absl::Status CheckSameSpec(const v1::TurnSpec& stored, const v1::TurnSpec& spec);

// The input of Score, Logits and Embed. `plain_text`: as in v1::GenerateRequest.
absl::StatusOr<std::vector<uint32_t>> MakeTokens(const std::string* text, const v1::TokenList* tokens,
                                                 const ServingModel& model, const InputLimits& limits,
                                                 bool plain_text = false);

// A document as ScoreDocument takes it.
struct Document {
  std::string model;                // Empty: the one that is served.
  std::vector<uint32_t> token_ids;  // Before the text.
  std::string text;                 // Any bytes.
  std::string initial_state = "";   // Empty: the model's own.

  int64_t Bytes() const { return static_cast<int64_t>(text.size() + sizeof(uint32_t) * token_ids.size()); }
};

// kResourceExhausted, for a document of more than limits.max_document_bytes.
absl::Status DocumentTooLarge(const InputLimits& limits);

// The tokens of a document, at least one. Errors as of MakeTurnInput().
absl::StatusOr<std::vector<uint32_t>> MakeDocumentTokens(const Document& document, const ServingModel& model,
                                                         const InputLimits& limits);

// kNotFound unless `name` is empty, the model's name or its fingerprint.
absl::Status CheckModel(absl::string_view name, const ServingModel& model);

// The tuned state of the model that `name` means, in full; `name` may leave out the "@" and what follows. Empty for an
// empty name. kNotFound: there is none.
absl::StatusOr<std::string> FindInitialState(absl::string_view name, const v1::ModelInfo& model);

// Whether what began with `initial_state` (in full, or empty) can be rebuilt with this model.
// kFailedPrecondition: the model does not offer it.
absl::Status CheckOffered(absl::string_view initial_state, const v1::ModelInfo& model);

// kInvalidArgument unless 1 to 128 of A-Z a-z 0-9 . _ - : , maybe after a tenant (services/common/tenant_ids.h).
absl::Status CheckSessionId(absl::string_view field, absl::string_view id);

// Offset of the first byte that does not belong to a well-formed character; npos if all do.
size_t FindInvalidUtf8(absl::string_view text);

// Why bytes that are no GenerateRequest or ScoreRequest are none, given the bytes of its text.
absl::Status UnparsableRequest(absl::string_view message_name, absl::string_view text);

}  // namespace rwkv::router
