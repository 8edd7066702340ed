#include "services/router/client/router_client.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/client_context.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/crc32c.h"

namespace rwkv::router {
namespace {

// Of a document that goes out in one message; a token id takes at most kMaxTokenBytes.
constexpr int kPieceBytes = 1 << 20;
constexpr int kMaxTokenBytes = 5;

void SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

class GrpcRouterClient : public RouterClient {
 public:
  GrpcRouterClient(absl::Span<const std::shared_ptr<grpc::Channel>> channels, const RouterClientOptions& options)
      : options_(options) {
    for (const std::shared_ptr<grpc::Channel>& channel : channels) {
      routers_.push_back(
          {v1::Generation::NewStub(channel), v1::Sessions::NewStub(channel), v1::Cluster::NewStub(channel)});
    }
  }

  absl::Status Generate(const v1::GenerateRequest& request, GenerateCallback callback, Cancellation* cancellation,
                        absl::Time deadline) override {
    Cancellation never;
    if (cancellation == nullptr) cancellation = &never;
    deadline = std::min(deadline, absl::Now() + options_.stream_timeout);
    const bool resumable = !request.session_id().empty() && !request.request_id().empty();
    v1::GenerateRequest attempt = request;
    absl::Duration pause = options_.first_pause;
    size_t left = 0;  // Routers that were gone before a token came.
    for (int failures = 0;;) {
      const uint64_t first = attempt.resume_from();
      uint64_t next = first;
      const size_t router = current_;
      const absl::Status status = GenerateOnce(router, attempt, deadline, callback, cancellation, next);
      if (cancellation->cancelled()) return absl::CancelledError("the call was cancelled by its caller");
      const bool is_gone = absl::IsUnavailable(status);
      if (is_gone) LeaveRouter(router);
      // A turn without a session has changed nothing anywhere.
      if (is_gone && request.session_id().empty() && next == first && ++left < routers_.size()) continue;
      // While a call is resumed elsewhere, the router that was lost may still hold the session for a while.
      const bool is_held = failures > 0 && absl::IsAborted(status) && common::GetRetryDelay(status).has_value();
      if ((!is_gone && !is_held) || !resumable) return status;
      if (next > first) {
        failures = 0;
        pause = options_.first_pause;
      }
      const absl::Duration wait = std::max(pause, common::GetRetryDelay(status).value_or(absl::ZeroDuration()));
      if (++failures > options_.max_resumes || absl::Now() + wait >= deadline) return status;
      if (cancellation->WaitFor(wait)) return absl::CancelledError("the call was cancelled by its caller");
      pause = std::min(2 * pause, options_.last_pause);
      attempt.set_resume_from(next);
    }
  }

  absl::Status Logits(const v1::LogitsRequest& request, LogitsCallback callback) override {
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + options_.stream_timeout);
    return Drain<v1::LogitsResponse>(context, *generation().Logits(&context, request), callback);
  }

  absl::StatusOr<v1::ScoreResponse> Score(const v1::ScoreRequest& request) override {
    return Read<v1::ScoreResponse>(&Router::generation, &v1::Generation::Stub::Score, request);
  }
  absl::StatusOr<v1::EmbedResponse> Embed(const v1::EmbedRequest& request) override {
    return Read<v1::EmbedResponse>(&Router::generation, &v1::Generation::Stub::Embed, request);
  }
  absl::Status ScoreDocument(const v1::ScoreDocumentRequest& document, DocumentCallback callback) override {
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + options_.stream_timeout);
    const auto stream = generation().ScoreDocument(&context);
    v1::ScoreDocumentRequest piece;
    piece.set_model(document.model());
    // A write that fails means that the call is over; Finish() will say why.
    bool writing = true;
    for (int begin = 0; writing && begin < document.token_ids_size(); begin += kPieceBytes / kMaxTokenBytes) {
      const int end = std::min(document.token_ids_size(), begin + kPieceBytes / kMaxTokenBytes);
      piece.mutable_token_ids()->Assign(document.token_ids().begin() + begin, document.token_ids().begin() + end);
      writing = stream->Write(piece);
      piece.Clear();
    }
    for (size_t begin = 0; writing && begin < document.text().size(); begin += kPieceBytes) {
      piece.set_text(document.text().substr(begin, kPieceBytes));
      writing = stream->Write(piece);
      piece.Clear();
    }
    if (writing) stream->WritesDone();
    uint64_t next = 1;
    uint64_t end = 0;  // Unknown.
    const absl::Status status =
        Drain<v1::ScoreDocumentResponse>(context, *stream, [&](const v1::ScoreDocumentResponse& response) {
          if (response.first() != next || response.token_ids_size() != response.logprobs_size()) {
            return absl::DataLossError(
                absl::StrCat("the stream goes on with token ", response.first(), " where ", next, " was expected"));
          }
          next += response.logprobs_size();
          end = response.token_count();
          return callback(response);
        });
    if (status.ok() && next != end) {
      return absl::DataLossError(absl::StrCat("the stream ended without the tokens from ", next,
                                              end == 0 ? " on" : absl::StrCat(" to ", end)));
    }
    return status;
  }
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request) override {
    return Read<v1::TokenizeResponse>(&Router::generation, &v1::Generation::Stub::Tokenize, request);
  }
  absl::StatusOr<std::vector<uint32_t>> TokenizeDocument(absl::string_view text) override {
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + options_.stream_timeout);
    const auto stream = generation().TokenizeDocument(&context);
    v1::TokenizeDocumentRequest piece;
    bool writing = true;  // As in ScoreDocument.
    for (size_t begin = 0; writing && begin < text.size(); begin += kPieceBytes) {
      piece.set_text(std::string(text.substr(begin, kPieceBytes)));
      writing = stream->Write(piece);
    }
    if (writing) stream->WritesDone();
    std::vector<uint32_t> tokens;
    const absl::Status status =
        Drain<v1::TokenizeDocumentResponse>(context, *stream, [&](const v1::TokenizeDocumentResponse& response) {
          tokens.insert(tokens.end(), response.token_ids().begin(), response.token_ids().end());
          return absl::OkStatus();
        });
    if (!status.ok()) return status;
    return tokens;
  }
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request) override {
    return Read<v1::DetokenizeResponse>(&Router::generation, &v1::Generation::Stub::Detokenize, request);
  }
  absl::StatusOr<v1::ListModelsResponse> ListModels() override {
    return Read<v1::ListModelsResponse>(&Router::generation, &v1::Generation::Stub::ListModels,
                                        v1::ListModelsRequest());
  }

  absl::StatusOr<v1::Session> CreateSession(const v1::SessionsCreateRequest& request) override {
    return SessionOf(Call<v1::SessionsCreateResponse>(&Router::sessions, &v1::Sessions::Stub::Create, request));
  }
  absl::StatusOr<v1::SessionsGetResponse> GetSession(const v1::SessionsGetRequest& request) override {
    return Read<v1::SessionsGetResponse>(&Router::sessions, &v1::Sessions::Stub::Get, request);
  }
  absl::StatusOr<v1::SessionsListResponse> ListSessions(const v1::SessionsListRequest& request) override {
    return Read<v1::SessionsListResponse>(&Router::sessions, &v1::Sessions::Stub::List, request);
  }
  absl::StatusOr<v1::Session> ForkSession(const v1::SessionsForkRequest& request) override {
    return SessionOf(Call<v1::SessionsForkResponse>(&Router::sessions, &v1::Sessions::Stub::Fork, request));
  }
  absl::StatusOr<v1::Session> RewindSession(const v1::SessionsRewindRequest& request) override {
    return SessionOf(Call<v1::SessionsRewindResponse>(&Router::sessions, &v1::Sessions::Stub::Rewind, request));
  }
  absl::Status DeleteSession(const v1::SessionsDeleteRequest& request) override {
    return Call<v1::SessionsDeleteResponse>(&Router::sessions, &v1::Sessions::Stub::Delete, request).status();
  }
  absl::Status ExportState(const v1::SessionsExportStateRequest& request, StateCallback callback) override {
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + options_.stream_timeout);
    return Drain<v1::SessionsExportStateResponse>(context, *sessions().ExportState(&context, request), callback);
  }

  absl::StatusOr<v1::Session> ImportSession(const std::string& session_id, absl::string_view file,
                                            ImportProgress progress) override {
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + options_.stream_timeout);
    v1::SessionsImportResponse response;
    const auto writer = sessions().Import(&context, &response);
    v1::SessionsImportRequest piece;
    piece.set_session_id(session_id);
    piece.set_crc32c(state_store::Crc32c(file));
    bool writing = true;  // As in ScoreDocument.
    for (size_t begin = 0; writing && begin < file.size(); begin += kPieceBytes) {
      const absl::string_view data = file.substr(begin, kPieceBytes);
      piece.set_data(data.data(), data.size());
      writing = writer->Write(piece);
      piece.Clear();
      if (writing) progress(begin + data.size());
    }
    if (writing) writer->WritesDone();
    const absl::Status status = common::FromGrpcStatus(writer->Finish());
    if (!status.ok()) return status;
    return std::move(*response.mutable_session());
  }

  absl::StatusOr<v1::GetStatusResponse> GetStatus() override {
    return Read<v1::GetStatusResponse>(&Router::cluster, &v1::Cluster::Stub::GetStatus, v1::GetStatusRequest());
  }
  absl::StatusOr<v1::GetTenantUsageResponse> GetTenantUsage(const v1::GetTenantUsageRequest& request) override {
    return Read<v1::GetTenantUsageResponse>(&Router::cluster, &v1::Cluster::Stub::GetTenantUsage, request);
  }

 private:
  struct Router {
    std::unique_ptr<v1::Generation::Stub> generation;
    std::unique_ptr<v1::Sessions::Stub> sessions;
    std::unique_ptr<v1::Cluster::Stub> cluster;
  };

  v1::Generation::Stub& generation() const { return *routers_[current_].generation; }
  v1::Sessions::Stub& sessions() const { return *routers_[current_].sessions; }

  // The next calls go to another router, unless somebody has seen to that already.
  void LeaveRouter(size_t router) const { current_.compare_exchange_strong(router, (router + 1) % routers_.size()); }

  // One call. `next` is the index to go on from; it rises with every token that was called back. The returned status is
  // the server's, or the callback's.
  absl::Status GenerateOnce(size_t router, const v1::GenerateRequest& request, absl::Time deadline,
                            GenerateCallback callback, Cancellation* cancellation, uint64_t& next) {
    bool finished = false;
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    Cancellation::Scope scope(cancellation, &context);
    const absl::Status status = Drain<v1::GenerateResponse>(
        context, *routers_[router].generation->Generate(&context, request), [&](const v1::GenerateResponse& response) {
          // Nothing follows `finish`, and a resumed stream may start early, but never late.
          if (finished || (!response.has_finish() && response.index() < next)) return absl::OkStatus();
          if (response.index() != next) {
            return absl::DataLossError(
                absl::StrCat("the stream goes on with index ", response.index(), " where ", next, " was expected"));
          }
          if (response.has_finish()) {
            finished = true;
          } else {
            ++next;
          }
          return callback(response);
        });
    if (finished && status.code() == absl::StatusCode::kUnavailable) return absl::OkStatus();  // Nothing was lost.
    if (status.ok() && !finished) return absl::DataLossError("the stream ended without its last message");
    return status;
  }

  // Calls back for each message; a callback's error cancels the call and is returned in place of the call's status.
  template <typename Response, typename Reader, typename Callback>
  static absl::Status Drain(grpc::ClientContext& context, Reader& reader, Callback callback) {
    absl::Status status;
    Response response;
    while (status.ok() && reader.Read(&response)) status = callback(response);
    if (!status.ok()) {
      context.TryCancel();
      while (reader.Read(&response)) {
      }
    }
    const absl::Status end = common::FromGrpcStatus(reader.Finish());
    if (!status.ok()) return status;
    // Unless its caller did it, which Generate() looks at first: a router that stops ends the calls that are left.
    if (absl::IsCancelled(end))
      return absl::UnavailableError(absl::StrCat("the router ended the call: ", end.message()));
    return end;
  }

  template <typename Response, typename Stub, typename Method, typename Request>
  absl::StatusOr<Response> Call(std::unique_ptr<Stub> Router::*stub, Method method, const Request& request) const {
    const size_t router = current_;
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + options_.call_timeout);
    Response response;
    const grpc::Status status = ((*(routers_[router].*stub)).*method)(&context, request, &response);
    if (status.ok()) return response;
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE) LeaveRouter(router);
    return common::FromGrpcStatus(status);
  }

  // A call that changes nothing, at each router until one answers.
  template <typename Response, typename Stub, typename Method, typename Request>
  absl::StatusOr<Response> Read(std::unique_ptr<Stub> Router::*stub, Method method, const Request& request) const {
    absl::StatusOr<Response> response = Call<Response>(stub, method, request);
    for (size_t tried = 1; tried < routers_.size() && absl::IsUnavailable(response.status()); ++tried) {
      response = Call<Response>(stub, method, request);
    }
    return response;
  }

  template <typename Response>
  static absl::StatusOr<v1::Session> SessionOf(absl::StatusOr<Response> response) {
    if (!response.ok()) return response.status();
    return std::move(*response->mutable_session());
  }

  const RouterClientOptions options_;
  std::vector<Router> routers_;             // Not changed after the constructor.
  mutable std::atomic<size_t> current_{0};  // Index of the one that calls go to.
};

}  // namespace

std::unique_ptr<RouterClient> MakeRouterClient(std::shared_ptr<grpc::Channel> channel,
                                               const RouterClientOptions& options) {
  return std::make_unique<GrpcRouterClient>(absl::MakeConstSpan(&channel, 1), options);
}

std::unique_ptr<RouterClient> MakeRouterClient(absl::Span<const std::shared_ptr<grpc::Channel>> channels,
                                               const RouterClientOptions& options) {
  return std::make_unique<GrpcRouterClient>(channels, options);
}

}  // namespace rwkv::router
