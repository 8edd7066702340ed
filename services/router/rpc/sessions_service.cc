#include "services/router/rpc/sessions_service.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/tracing/trace_context.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_input.h"
#include "services/router/rpc/import_call.h"
#include "services/router/rpc/stream_reactor.h"
#include "services/router/rpc/turn_spans.h"
#include "services/tokenizer/stream_decoder.h"

namespace rwkv::router {
namespace {

constexpr absl::Duration kStoreTimeout = absl::Seconds(15);
constexpr uint64_t kChunkBytes = 1 << 20;
// A message that gRPC's clients take without being asked has 4 MiB; the tokens need some of it.
constexpr size_t kMaxTextBytes = 3 << 20;

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  return std::min(absl::FromChrono(context.deadline()), absl::Now() + kStoreTimeout);
}

absl::Status TooMuch() {
  return common::WithRetryInfo(absl::ResourceExhaustedError("too many calls to the state store wait"),
                               absl::Milliseconds(200));
}

// Streams the records of a snapshot as tensors: one record at a time, the next when the client has taken half of it.
class StateExport : public std::enable_shared_from_this<StateExport> {
 public:
  using Stream = ResponseStream<v1::SessionsExportStateResponse>;

  StateExport(TurnManager* turns, state_store::CatalogClient* catalog, state_store::RecordsClient* records,
              common::Executor* executor, const Caller& caller, const std::string& session_id,
              std::shared_ptr<Stream> stream, common::Tracer* tracer, std::shared_ptr<common::Span> span)
      : turns_(turns),
        catalog_(catalog),
        records_(records),
        executor_(executor),
        caller_(caller),
        session_id_(caller.In(session_id)),
        stream_(std::move(stream)),
        tracer_(tracer),
        span_(std::move(span)),
        trace_(span_ == nullptr ? common::TraceContext() : span_->context()) {}

  void Begin(CallId call) {
    call_ = call;
    const auto done = [self = shared_from_this()](absl::StatusOr<TurnManager::ExportedState> state) {
      if (!state.ok()) return self->Close(state.status());
      self->state_ = *std::move(state);
      self->ReadNext();
    };
    turns_->Export(call, session_id_, done, span_ == nullptr ? nullptr : std::make_shared<TurnSpans>(tracer_, span_));
  }

 private:
  static constexpr int kAttempts = 3;

  void Close(const absl::Status& status) { stream_->Close(caller_.Out(status)); }

  void ReadNext() {
    if (!executor_->TryRun([self = shared_from_this()] { self->ReadNow(); })) Close(TooMuch());
  }

  void ReadNow() {
    const common::ScopedTrace scope(trace_);
    const absl::Time deadline = absl::Now() + kStoreTimeout;
    const v1::RecordInfo& record = state_.manifest.records(layer_);
    absl::StatusOr<std::string> bytes = records_->GetRecord(record, deadline);
    if (bytes.ok() && bytes->size() != LayoutBytes()) {
      bytes = absl::DataLossError(
          absl::StrCat("a record of ", bytes->size(), " bytes where the model has ", LayoutBytes()));
    }
    if (absl::IsDataLoss(bytes.status()) || absl::IsNotFound(bytes.status())) return StartOver(bytes.status());
    if (!bytes.ok()) return Close(bytes.status());
    SendLayer(record.layer(), *bytes);
    if (++layer_ == state_.manifest.records_size()) return Close(absl::OkStatus());
    stream_->OnRoom([self = shared_from_this()] { self->ReadNext(); });
  }

  // The snapshot is a cache: without it, the log is fed again.
  void StartOver(const absl::Status& why) {
    v1::DropSnapshotRequest drop;
    drop.set_session_id(session_id_);
    drop.set_snapshot_id(state_.manifest.snapshot_id());
    drop.set_reason(why.ToString());
    const absl::Status dropped = catalog_->DropSnapshot(drop, absl::Now() + kStoreTimeout).status();
    if (dropped.ok() && layer_ == 0 && ++attempts_ < kAttempts) return Begin(call_);
    if (absl::IsFailedPrecondition(dropped)) {
      return Close(absl::DataLossError(absl::StrCat(dropped.message(), ": ", why.message())));
    }
    Close(common::WithRetryInfo(
        absl::AbortedError(absl::StrCat("the snapshot could not be read and is dropped: ", why.message())),
        absl::Milliseconds(200)));
  }

  uint64_t LayoutBytes() const {
    uint64_t bytes = 0;
    for (const v1::StateTensor& tensor : state_.layout) bytes += TensorBytes(tensor);
    return bytes;
  }

  static uint64_t TensorBytes(const v1::StateTensor& tensor) {
    uint64_t bytes = sizeof(float);
    for (int64_t size : tensor.shape()) bytes *= static_cast<uint64_t>(size);
    return bytes;
  }

  void SendLayer(int layer, const std::string& bytes) {
    uint64_t begin = 0;
    for (const v1::StateTensor& tensor : state_.layout) {
      const uint64_t size = TensorBytes(tensor);
      for (uint64_t offset = 0; offset < size; offset += kChunkBytes) {
        v1::SessionsExportStateResponse message;
        message.set_tensor(absl::StrCat("blocks.", layer, ".", tensor.name()));
        *message.mutable_shape() = tensor.shape();
        message.set_offset_bytes(offset);
        message.set_data(bytes.substr(begin + offset, std::min(kChunkBytes, size - offset)));
        message.set_position(state_.manifest.position());
        message.set_model_fingerprint(state_.manifest.model_fingerprint());
        stream_->Send(std::move(message));
      }
      begin += size;
    }
  }

  TurnManager* const turns_;
  state_store::CatalogClient* const catalog_;
  state_store::RecordsClient* const records_;
  common::Executor* const executor_;
  const Caller caller_;
  const std::string session_id_;
  const std::shared_ptr<Stream> stream_;
  common::Tracer* const tracer_;
  const std::shared_ptr<common::Span> span_;  // The call's; null: it is not traced.
  const common::TraceContext trace_;
  // One step at a time touches the rest, each started by the one before.
  CallId call_ = 0;
  TurnManager::ExportedState state_;
  int layer_ = 0;
  int attempts_ = 0;
};

// A unary call whose answer comes from the turn manager.
class ExclusiveReactor final : public grpc::ServerUnaryReactor {
 public:
  ExclusiveReactor(TurnManager* turns, CallId call) : turns_(turns), call_(call) {}
  void OnCancel() override { turns_->Cancel(call_); }
  void OnDone() override { delete this; }

 private:
  TurnManager* const turns_;
  const CallId call_;
};

}  // namespace

SessionsService::SessionsService(TurnManager* turns, state_store::CatalogClient* catalog,
                                 state_store::RecordsClient* records, common::Executor* executor,
                                 std::function<uint64_t()> random, const UploadLimits& uploads, Tenancy* tenancy,
                                 common::Tracer* tracer)
    : turns_(turns),
      catalog_(catalog),
      records_(records),
      executor_(executor),
      random_(std::move(random)),
      tenancy_(tenancy),
      tracer_(tracer),
      import_shares_(kMaxImports, kMaxImportBytes, "state"),
      upload_limits_(uploads) {}

std::string SessionsService::NewSessionId() const { return absl::StrFormat("s-%016x%08x", random_(), random_() >> 32); }

grpc::ServerUnaryReactor* SessionsService::Run(grpc::CallbackServerContext* context, Work work) {
  auto* const reactor = context->DefaultReactor();
  const absl::Time deadline = DeadlineOf(*context);
  const absl::StatusOr<Caller> caller = tenancy_->CallerOfRequest(*context);
  const absl::StatusOr<std::shared_ptr<Crowd::Place>> place =
      caller.ok() ? tenancy_->EnterStore(*caller) : caller.status();
  if (!place.ok()) {
    reactor->Finish(common::ToGrpcStatus(place.status()));
    return reactor;
  }
  if (!executor_->TryRun([reactor, deadline, caller = *caller, place = *place,
                          trace = common::TraceOf(tracer_, *context), work = std::move(work)] {
        const common::ScopedTrace scope(trace);
        const absl::Status status = caller.Out(work(caller, deadline));
        if (place != nullptr) place->Leave();  // First: whoever hears of the end may come again at once.
        reactor->Finish(common::ToGrpcStatus(status));
      })) {
    reactor->Finish(common::ToGrpcStatus(TooMuch()));
  }
  return reactor;
}

grpc::ServerUnaryReactor* SessionsService::Create(grpc::CallbackServerContext* context,
                                                  const v1::SessionsCreateRequest* request,
                                                  v1::SessionsCreateResponse* response) {
  return Run(context, [this, request, response](const Caller& caller, absl::Time deadline) {
    v1::CreateSessionRequest create;
    const std::string id = request->session_id().empty() ? NewSessionId() : request->session_id();
    RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("session_id", id));
    RWKV_RETURN_IF_ERROR(caller.CheckStorage(deadline));
    create.set_session_id(caller.In(id));
    if (!request->initial_state().empty()) {
      RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const ServingModel> model, turns_->ModelOrWhyNot(request->model()));
      RWKV_RETURN_IF_ERROR(caller.CheckModel(model->info));
      RWKV_ASSIGN_OR_RETURN(*create.mutable_initial_state(), FindInitialState(request->initial_state(), model->info));
    }
    RWKV_ASSIGN_OR_RETURN(v1::CreateSessionResponse created, catalog_->CreateSession(create, deadline));
    *response->mutable_session() = std::move(*created.mutable_session());
    caller.Out(response->mutable_session());
    return absl::OkStatus();
  });
}

absl::Status SessionsService::GetNow(const v1::SessionsGetRequest& request, const Caller& caller, absl::Time deadline,
                                     v1::SessionsGetResponse* response) const {
  RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("session_id", request.session_id()));
  if (request.tokens_count() > kMaxTokensPerGet) {
    return common::InvalidFieldError("tokens_count",
                                     absl::StrCat(request.tokens_count(), "; at most ", kMaxTokensPerGet));
  }
  v1::GetSessionRequest get;
  get.set_session_id(caller.In(request.session_id()));
  RWKV_ASSIGN_OR_RETURN(v1::GetSessionResponse got, catalog_->GetSession(get, deadline));
  *response->mutable_session() = std::move(*got.mutable_session());
  caller.Out(response->mutable_session());
  const uint64_t length = response->session().token_count();
  if (request.tokens_begin() > length) {
    return absl::OutOfRangeError(
        absl::StrCat("tokens_begin ", request.tokens_begin(), " is beyond the session's ", length, " tokens"));
  }
  const uint64_t end =
      request.tokens_begin() + std::min<uint64_t>(request.tokens_count(), length - request.tokens_begin());
  if (end == request.tokens_begin()) return absl::OkStatus();
  v1::ReadTokensRequest read;
  read.set_session_id(get.session_id());
  read.set_begin(request.tokens_begin());
  read.set_end(end);
  RWKV_ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, catalog_->ReadTokens(read, deadline));
  response->mutable_token_ids()->Add(ids.begin(), ids.end());
  const TurnManager::Models models = turns_->models();
  const auto served = models.served.find(response->session().model_fingerprint());
  if (served == models.served.end() || served->second->tokenizer == nullptr) return absl::OkStatus();
  const std::shared_ptr<const ServingModel> model = served->second;
  std::string text = tokenizer::DecodeUtf8(model->tokenizer->Decode(ids));
  if (text.size() > kMaxTextBytes) {
    return absl::OutOfRangeError(absl::StrCat("the text has ", text.size(), " bytes; ask for fewer tokens"));
  }
  response->set_text(std::move(text));
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* SessionsService::Get(grpc::CallbackServerContext* context,
                                               const v1::SessionsGetRequest* request,
                                               v1::SessionsGetResponse* response) {
  return Run(context, [this, request, response](const Caller& caller, absl::Time deadline) {
    return GetNow(*request, caller, deadline, response);
  });
}

grpc::ServerUnaryReactor* SessionsService::List(grpc::CallbackServerContext* context,
                                                const v1::SessionsListRequest* request,
                                                v1::SessionsListResponse* response) {
  return Run(context, [this, request, response](const Caller& caller, absl::Time deadline) {
    if (request->page_size() > kMaxPageSize) {
      return common::InvalidFieldError("page_size", absl::StrCat(request->page_size(), "; at most ", kMaxPageSize));
    }
    v1::ListSessionsRequest list;
    list.set_page_size(request->page_size() == 0 ? kDefaultPageSize : request->page_size());
    if (!request->page_token().empty())
      RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("page_token", request->page_token()));
    list.set_page_token(caller.In(request->page_token()));
    RWKV_ASSIGN_OR_RETURN(v1::ListSessionsResponse page, catalog_->ListSessions(list, deadline));
    *response->mutable_sessions() = std::move(*page.mutable_sessions());
    for (v1::Session& session : *response->mutable_sessions()) caller.Out(&session);
    response->set_next_page_token(caller.Out(page.next_page_token()));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* SessionsService::Fork(grpc::CallbackServerContext* context,
                                                const v1::SessionsForkRequest* request,
                                                v1::SessionsForkResponse* response) {
  return Run(context, [this, request, response](const Caller& caller, absl::Time deadline) {
    RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("session_id", request->session_id()));
    v1::ForkSessionRequest fork;
    fork.set_session_id(caller.In(request->session_id()));
    if (request->has_position()) fork.set_position(request->position());
    const std::string new_id = request->new_session_id().empty() ? NewSessionId() : request->new_session_id();
    RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("new_session_id", new_id));
    RWKV_RETURN_IF_ERROR(caller.CheckStorage(deadline));
    fork.set_new_session_id(caller.In(new_id));
    RWKV_ASSIGN_OR_RETURN(v1::ForkSessionResponse forked, catalog_->ForkSession(fork, deadline));
    *response->mutable_session() = std::move(*forked.mutable_session());
    caller.Out(response->mutable_session());
    return absl::OkStatus();
  });
}

absl::StatusOr<Caller> SessionsService::EnterSession(const grpc::CallbackServerContext& context,
                                                     const std::string& session_id) const {
  RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("session_id", session_id));
  return tenancy_->CallerOfRequest(context);
}

grpc::ServerUnaryReactor* SessionsService::Rewind(grpc::CallbackServerContext* context,
                                                  const v1::SessionsRewindRequest* request,
                                                  v1::SessionsRewindResponse* response) {
  const CallId call = turns_->NewCall();
  auto* const reactor = new ExclusiveReactor(turns_, call);
  const absl::StatusOr<Caller> caller = EnterSession(*context, request->session_id());
  if (!caller.ok()) {
    reactor->Finish(common::ToGrpcStatus(caller.status()));
    return reactor;
  }
  auto session = std::make_shared<v1::Session>();
  turns_->Exclusive(
      call, caller->In(request->session_id()), /*deletes=*/false,
      [catalog = catalog_, session, position = request->position(),
       deadline = DeadlineOf(*context)](const v1::AcquireLeaseResponse& held) {
        v1::RewindSessionRequest rewind;
        *rewind.mutable_lease() = held.lease();
        rewind.set_position(position);
        rewind.set_log_branch(held.log_branch());
        RWKV_ASSIGN_OR_RETURN(v1::RewindSessionResponse rewound, catalog->RewindSession(rewind, deadline));
        *session = std::move(*rewound.mutable_session());
        return absl::OkStatus();
      },
      [reactor, session, response, caller = *caller](const absl::Status& status) {
        if (status.ok()) *response->mutable_session() = *session;
        if (status.ok()) caller.Out(response->mutable_session());
        reactor->Finish(common::ToGrpcStatus(caller.Out(status)));
      },
      TurnSpans::Of(tracer_, *context));
  return reactor;
}

grpc::ServerUnaryReactor* SessionsService::Delete(grpc::CallbackServerContext* context,
                                                  const v1::SessionsDeleteRequest* request,
                                                  v1::SessionsDeleteResponse* response) {
  const CallId call = turns_->NewCall();
  auto* const reactor = new ExclusiveReactor(turns_, call);
  const absl::StatusOr<Caller> caller = EnterSession(*context, request->session_id());
  if (!caller.ok()) {
    reactor->Finish(common::ToGrpcStatus(caller.status()));
    return reactor;
  }
  turns_->Exclusive(
      call, caller->In(request->session_id()), /*deletes=*/true,
      [catalog = catalog_, deadline = DeadlineOf(*context)](const v1::AcquireLeaseResponse& held) {
        v1::DeleteSessionRequest erase;
        *erase.mutable_lease() = held.lease();
        return catalog->DeleteSession(erase, deadline).status();
      },
      [reactor, caller = *caller](const absl::Status& status) {
        reactor->Finish(common::ToGrpcStatus(caller.Out(status)));
      },
      TurnSpans::Of(tracer_, *context));
  return reactor;
}

grpc::ServerWriteReactor<v1::SessionsExportStateResponse>* SessionsService::ExportState(
    grpc::CallbackServerContext* context, const v1::SessionsExportStateRequest* request) {
  using Reactor = StreamReactor<v1::SessionsExportStateResponse, v1::SessionsExportStateResponse>;
  const CallId call = turns_->NewCall();
  auto* const reactor = new Reactor([](const v1::SessionsExportStateResponse& response) { return response; },
                                    [turns = turns_, call] { turns->Cancel(call); });
  const absl::StatusOr<Caller> caller = EnterSession(*context, request->session_id());
  if (!caller.ok()) {
    reactor->stream()->Close(caller.status());
    return reactor;
  }
  std::make_shared<StateExport>(turns_, catalog_, records_, executor_, *caller, request->session_id(),
                                reactor->stream(), tracer_, tracer_ == nullptr ? nullptr : tracer_->SpanOf(context))
      ->Begin(call);
  return reactor;
}

grpc::ServerReadReactor<v1::SessionsImportRequest>* SessionsService::Import(grpc::CallbackServerContext* context,
                                                                            v1::SessionsImportResponse* response) {
  ImportCalls calls;
  const absl::StatusOr<Caller> caller = tenancy_->CallerOfRequest(*context);
  calls.known = caller.status();
  if (caller.ok()) calls.caller = *caller;
  calls.trace = common::TraceOf(tracer_, *context);
  calls.turns = turns_;
  calls.catalog = catalog_;
  calls.records = records_;
  calls.executor = executor_;
  calls.shares = &import_shares_;
  calls.limits = upload_limits_;
  calls.new_session_id = [this] { return NewSessionId(); };
  calls.new_snapshot_id = [this] { return absl::StrFormat("%016x%016x", random_(), random_()); };
  return NewImportCall(std::move(calls), absl::FromChrono(context->deadline()), response);
}

}  // namespace rwkv::router
