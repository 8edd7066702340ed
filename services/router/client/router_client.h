// Typed client of the public API: Generation, Sessions, Cluster.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "grpcpp/channel.h"
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/cancellation.h"

namespace rwkv::router {

// Statuses are the server's, with google.rpc details as payloads (services/common/grpc_status.h). kUnavailable: nobody
// answers at the address. kDeadlineExceeded: no answer in time. Thread-safe; calls block.
class RouterClient {
 public:
  virtual ~RouterClient() = default;

  using GenerateCallback = absl::FunctionRef<absl::Status(const v1::GenerateResponse&)>;
  // Calls back once for each token, with indices rising by one from request.resume_from, then once with `finish`. An
  // error of the callback ends the call and is returned. A turn with a session_id and a request_id survives a lost
  // connection: the call is made again with `resume_from`, and the callback notices nothing but a pause.
  // kCancelled: `cancellation` (not owned, may be null) was cancelled. kDataLoss: the stream lacks a token or its end.
  // kDeadlineExceeded: `deadline`, of which the router hears, or the client's own limit has passed.
  virtual absl::Status Generate(const v1::GenerateRequest& request, GenerateCallback callback,
                                Cancellation* cancellation = nullptr, absl::Time deadline = absl::InfiniteFuture()) = 0;

  using LogitsCallback = absl::FunctionRef<absl::Status(const v1::LogitsResponse&)>;
  virtual absl::Status Logits(const v1::LogitsRequest& request, LogitsCallback callback) = 0;

  virtual absl::StatusOr<v1::ScoreResponse> Score(const v1::ScoreRequest& request) = 0;
  virtual absl::StatusOr<v1::EmbedResponse> Embed(const v1::EmbedRequest& request) = 0;
  // Sends the document, however long, in pieces, and calls back for each answer: every token but the first, in order.
  // An error of the callback ends the call and is returned. kDataLoss: the stream lacks a token.
  using DocumentCallback = absl::FunctionRef<absl::Status(const v1::ScoreDocumentResponse&)>;
  virtual absl::Status ScoreDocument(const v1::ScoreDocumentRequest& document, DocumentCallback callback) = 0;
  virtual absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request) = 0;
  // The token ids of a text, however long; it goes out in pieces.
  virtual absl::StatusOr<std::vector<uint32_t>> TokenizeDocument(absl::string_view text) = 0;
  virtual absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request) = 0;
  virtual absl::StatusOr<v1::ListModelsResponse> ListModels() = 0;

  virtual absl::StatusOr<v1::Session> CreateSession(const v1::SessionsCreateRequest& request) = 0;
  virtual absl::StatusOr<v1::SessionsGetResponse> GetSession(const v1::SessionsGetRequest& request) = 0;
  virtual absl::StatusOr<v1::SessionsListResponse> ListSessions(const v1::SessionsListRequest& request) = 0;
  virtual absl::StatusOr<v1::Session> ForkSession(const v1::SessionsForkRequest& request) = 0;
  virtual absl::StatusOr<v1::Session> RewindSession(const v1::SessionsRewindRequest& request) = 0;
  virtual absl::Status DeleteSession(const v1::SessionsDeleteRequest& request) = 0;
  using StateCallback = absl::FunctionRef<absl::Status(const v1::SessionsExportStateResponse&)>;
  virtual absl::Status ExportState(const v1::SessionsExportStateRequest& request, StateCallback callback) = 0;
  // A new session that begins with the state in the bytes of `file`, which go out in pieces; `progress` hears how many
  // bytes are out. Empty id: the router makes one. On kUnavailable or kDeadlineExceeded the session may be there.
  using ImportProgress = absl::FunctionRef<void(uint64_t bytes_sent)>;
  virtual absl::StatusOr<v1::Session> ImportSession(const std::string& session_id, absl::string_view file,
                                                    ImportProgress progress) = 0;

  virtual absl::StatusOr<v1::GetStatusResponse> GetStatus() = 0;
  virtual absl::StatusOr<v1::GetTenantUsageResponse> GetTenantUsage(const v1::GetTenantUsageRequest& request) = 0;
};

struct RouterClientOptions {
  absl::Duration call_timeout = absl::Seconds(60);           // Of calls that answer with one message.
  absl::Duration stream_timeout = absl::InfiniteDuration();  // Of streams, all attempts together.
  // Attempts in a row that may fail with kUnavailable without a new token before Generate gives up. The pauses between
  // them double from the first to the last: with the defaults, 20 attempts span about half a minute.
  int max_resumes = 20;
  absl::Duration first_pause = absl::Milliseconds(50);
  absl::Duration last_pause = absl::Seconds(2);
};

std::unique_ptr<RouterClient> MakeRouterClient(std::shared_ptr<grpc::Channel> channel,
                                               const RouterClientOptions& options = {});

// The same over several routers of one cluster (at least one), any of which serves any session. All calls go to the one
// that answered last; after kUnavailable the next one is taken. So Generate resumes by itself at another router, and
// a turn whose session the lost router still holds waits until its lease is over. Other calls return kUnavailable, but
// those that change nothing, turns without a session among them until their first token, are first tried at each router
// once.
std::unique_ptr<RouterClient> MakeRouterClient(absl::Span<const std::shared_ptr<grpc::Channel>> channels,
                                               const RouterClientOptions& options = {});

}  // namespace rwkv::router
