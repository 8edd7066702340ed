// A router in memory, for tests of what uses one. Its model has 256 tokens, the bytes, and answers with a fixed script.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/router_client.h"

namespace rwkv::router {

// Not thread-safe but for cancellation. Sessions are kept as the real ones are: input and generated tokens make the
// log, a request id names a turn that runs once and can be resumed, and a turn without input goes on with the rest of
// the answer before it. No turn is ever forgotten, and none is cancelled by the next.
class FakeRouterClient : public RouterClient {
 public:
  // A turn that has a request id.
  struct NamedTurn {
    std::vector<uint32_t> input;
    std::string answer;
    std::vector<uint32_t> said;  // Of the answer, so far.
    bool finished = false;
  };
  struct State {
    // What each Generate says, byte by byte, up to max_tokens; then it finishes by LENGTH, or by STOP_STRING with the
    // request's first stop string if the script ran out.
    std::string answer = "Hello.";
    std::function<std::string(const std::string& input)> answer_to;  // If set, instead of `answer`. Input as bytes.
    bool has_tokenizer = true;
    std::string model_name = "fake";
    std::string chat_template;                          // What the model's file says of it.
    absl::Status generate_status;                       // After the tokens, in place of the finish, if not OK.
    std::vector<absl::Status> first_statuses;           // Generate takes these first, one a call, before any token.
    std::map<std::string, std::vector<uint32_t>> logs;  // Of the sessions, by id.
    std::map<std::string, std::string> initial_states;  // Likewise.
    std::map<std::pair<std::string, std::string>, NamedTurn> turns;  // By session and request id.
    std::map<std::string, std::string> unsaid;  // The rest of each session's last answer, cut off by max_tokens.
    std::vector<v1::GenerateRequest> generate_requests;
    std::vector<absl::Time> generate_deadlines;  // Of these; the fake itself has all the time in the world.
    std::vector<v1::ScoreRequest> score_requests;
    std::vector<v1::TokenizeRequest> tokenize_requests;
    std::vector<v1::ScoreDocumentRequest> documents;
    v1::GetStatusResponse status;
    std::function<absl::Status()> on_status;  // Before each status, or instead of it.
    v1::GetTenantUsageResponse usage;  // Of whatever tenant is asked for.
    std::vector<v1::SessionsExportStateResponse> exported_state;
    std::function<void()> on_export;               // After the last message.
    std::vector<std::string> imported_files;       // As they came.
    std::map<std::string, uint64_t> bases;         // base_position and log_begin of sessions that have one, by id.
    std::function<void(uint64_t index)> on_token;  // Before each token.
  };
  explicit FakeRouterClient(State* state) : state_(state) {}  // Outlives the client.

  absl::Status Generate(const v1::GenerateRequest& request, GenerateCallback callback, Cancellation* cancellation,
                        absl::Time deadline) override;
  // Row t is [token t, token t + 0.25, ...] in steps of 0.25, V = 4; one message a row.
  absl::Status Logits(const v1::LogitsRequest& request, LogitsCallback callback) override;
  // Every token has logprob -(id + 1) / 256.
  absl::StatusOr<v1::ScoreResponse> Score(const v1::ScoreRequest& request) override;
  // [first token, last token, source], or half of each when normalized.
  absl::StatusOr<v1::EmbedResponse> Embed(const v1::EmbedRequest& request) override;
  // As Score; three a message. Needs a tokenizer for text.
  absl::Status ScoreDocument(const v1::ScoreDocumentRequest& document, DocumentCallback callback) override;
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request) override;
  absl::StatusOr<std::vector<uint32_t>> TokenizeDocument(absl::string_view text) override;
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request) override;
  absl::StatusOr<v1::ListModelsResponse> ListModels() override;
  absl::StatusOr<v1::Session> CreateSession(const v1::SessionsCreateRequest& request) override;
  absl::StatusOr<v1::SessionsGetResponse> GetSession(const v1::SessionsGetRequest& request) override;
  absl::StatusOr<v1::SessionsListResponse> ListSessions(const v1::SessionsListRequest& request) override;
  absl::StatusOr<v1::Session> ForkSession(const v1::SessionsForkRequest& request) override;
  absl::StatusOr<v1::Session> RewindSession(const v1::SessionsRewindRequest& request) override;
  absl::Status DeleteSession(const v1::SessionsDeleteRequest& request) override;
  absl::Status ExportState(const v1::SessionsExportStateRequest& request, StateCallback callback) override;
  // An empty session; its base is at bases[id], if that is set.
  absl::StatusOr<v1::Session> ImportSession(const std::string& session_id, absl::string_view file,
                                            ImportProgress progress) override;
  absl::StatusOr<v1::GetStatusResponse> GetStatus() override;
  absl::StatusOr<v1::GetTenantUsageResponse> GetTenantUsage(const v1::GetTenantUsageRequest& request) override;

 private:
  absl::StatusOr<std::vector<uint32_t>*> Find(const std::string& id);
  v1::Session Describe(const std::string& id) const;

  State* const state_;
};

}  // namespace rwkv::router
