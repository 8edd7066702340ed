#include "services/router/driver/turn_manager.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/tenant_ids.h"
#include "services/router/core/call_kinds.h"
#include "services/router/core/turn.h"
#include "services/router/driver/driver.h"
#include "services/tokenizer/completing_tokens.h"

namespace rwkv::router {
namespace {

std::shared_ptr<Turn> NewTurn(CallId call, std::unique_ptr<CallKind> kind, const std::string& tenant,
                              std::shared_ptr<TurnTrace> trace) {
  auto turn = std::make_shared<Turn>();
  turn->kind = std::move(kind);
  turn->call = call;
  turn->tenant = tenant;
  turn->trace = std::move(trace);
  return turn;
}

std::string TenantOf(const std::string& session_id) { return std::string(common::SplitScopedId(session_id).tenant); }

}  // namespace

TurnManager::TurnManager(const Options& options, Fleet::Options fleet_options, std::unique_ptr<WorkerSource> workers,
                         state_store::CatalogClient* catalog, std::vector<const tokenizer::Tokenizer*> tokenizers,
                         RouterMetrics* metrics, common::Clock* clock, std::function<uint64_t()> random)
    : driver_(std::make_unique<Driver>(options, std::move(fleet_options), std::move(workers), catalog,
                                       std::move(tokenizers), metrics, clock, std::move(random))) {}

TurnManager::~TurnManager() = default;

void TurnManager::Start() { driver_->Start(); }
void TurnManager::Drain(absl::Time deadline) { driver_->Drain(deadline); }
void TurnManager::Stop() { driver_->Stop(); }
void TurnManager::Cancel(CallId call) { driver_->Cancel(call); }
std::shared_ptr<const ServingModel> TurnManager::model() const { return driver_->model(); }
const InputLimits& TurnManager::limits() const { return driver_->options().limits; }
TurnManager::Models TurnManager::models() const { return driver_->models(); }
Fleet& TurnManager::fleet() { return driver_->fleet(); }
std::vector<TurnManager::LaneState> TurnManager::Lanes(absl::Time deadline) { return driver_->Lanes(deadline); }
TurnManager::Counts TurnManager::counts() const { return driver_->core().counts(); }
bool TurnManager::draining() const { return driver_->core().draining(); }
bool TurnManager::MakesProgress() const { return absl::Now() - driver_->last_round() < absl::Seconds(10); }

absl::StatusOr<std::shared_ptr<const ServingModel>> TurnManager::ModelOrWhyNot(absl::string_view name) const {
  if (driver_->core().draining()) return driver_->core().DrainingStatus();
  const Models models = driver_->models();
  if (name.empty() && models.served.size() == 1) return models.served.begin()->second;
  for (const auto& [fingerprint, model] : models.served) {
    if (!name.empty() && CheckModel(name, *model).ok()) return model;
  }
  if (name.empty() && models.served.size() > 1) {
    std::vector<std::string> names;
    for (const auto& [fingerprint, model] : models.served) names.push_back(model->info.name());
    return common::InvalidFieldError("model", absl::StrCat("is missing; there are ", absl::StrJoin(names, ", ")));
  }
  for (const auto& [fingerprint, model] : models.seen) {
    if (models.served.empty() || !CheckModel(name, *model).ok()) continue;
    return common::WithRetryInfo(
        absl::UnavailableError(absl::StrCat("this router drives no pipeline of the model ", model->info.name())),
        absl::Seconds(1));
  }
  if (!models.served.empty()) return CheckModel(name, *models.served.begin()->second);
  absl::Status why = driver_->fleet().state().status;
  if (why.ok()) why = absl::UnavailableError("the pipeline is just coming up");
  if (absl::IsUnavailable(why)) why = common::WithRetryInfo(why, absl::Seconds(1));
  return why;
}

absl::Status TurnManager::ChooseModel(absl::string_view model, absl::string_view initial_state, Turn* turn) const {
  RWKV_ASSIGN_OR_RETURN(turn->model, ModelOrWhyNot(model));
  RWKV_RETURN_IF_ERROR(CheckModel(model, *turn->model));
  RWKV_ASSIGN_OR_RETURN(turn->initial_state, FindInitialState(initial_state, turn->model->info));
  return absl::OkStatus();
}

template <typename Request>
absl::Status TurnManager::TakeInput(const Request& request, const std::string* text, const v1::TokenList* tokens,
                                    Turn* turn) const {
  RWKV_RETURN_IF_ERROR(ChooseModel(request.model(), request.initial_state(), turn));
  RWKV_ASSIGN_OR_RETURN(turn->prompt, MakeTokens(text, tokens, *turn->model, driver_->options().limits));
  turn->input_field = text != nullptr ? "text" : "tokens.ids";
  return absl::OkStatus();
}

template <typename Request>
absl::Status TurnManager::TakeTextOrTokens(const Request& request, Turn* turn) const {
  return TakeInput(request, request.has_text() ? &request.text() : nullptr,
                   request.has_tokens() ? &request.tokens() : nullptr, turn);
}

void TurnManager::SubmitFed(std::shared_ptr<Turn> turn) {
  const absl::Status fits = CheckContext(turn->input_field, 0, turn->prompt.size(), 0, turn->model->info);
  if (!fits.ok()) return driver_->Reject(*turn, fits);
  driver_->Submit(std::move(turn));
}

void TurnManager::Generate(CallId call, const v1::GenerateRequest& request,
                           std::shared_ptr<ResponseStream<v1::GenerateResponse>> stream, const std::string& tenant,
                           std::shared_ptr<TurnTrace> trace) {
  auto turn = NewTurn(call, std::make_unique<GenerateCall>(std::move(stream)), tenant, std::move(trace));
  if (const absl::Status status = CheckRequest(request); !status.ok()) return driver_->Reject(*turn, status);
  const absl::StatusOr<std::shared_ptr<const ServingModel>> model = ModelOrWhyNot(request.model());
  if (!model.ok()) return driver_->Reject(*turn, model.status());
  absl::StatusOr<TurnInput> input = MakeTurnInput(request, **model, driver_->options().limits, driver_->Random());
  if (!input.ok()) return driver_->Reject(*turn, input.status());
  turn->model = *model;
  turn->session_id = std::move(input->session_id);
  turn->named = !input->request_id.empty();
  turn->request_id = turn->named ? std::move(input->request_id) : absl::StrFormat("auto-%016x", driver_->Random());
  turn->prompt = std::move(input->tokens);
  turn->input_field = std::move(input->input_field);
  turn->spec = std::move(input->spec);
  if (turn->HasLog() && turn->spec.stop_size() > 0) {
    turn->pause_token_ids = tokenizer::CompletingTokens(
        *(*model)->tokenizer, std::vector<std::string>(turn->spec.stop().begin(), turn->spec.stop().end()));
    if (turn->pause_token_ids.has_value() && turn->pause_token_ids->size() > kMaxPauseTokens) {
      turn->pause_token_ids = absl::nullopt;
    }
  }
  turn->resume_from = input->resume_from;
  turn->prefix.marks = std::move(input->prefix_ends);
  turn->initial_state = std::move(input->initial_state);
  driver_->Submit(std::move(turn));
}

void TurnManager::Score(CallId call, const v1::ScoreRequest& request,
                        std::function<void(absl::StatusOr<v1::ScoreResponse>)> done, const std::string& tenant,
                        std::shared_ptr<TurnTrace> trace) {
  auto score = std::make_unique<ScoreCall>(std::move(done));
  ScoreCall* const kind = score.get();
  auto turn = NewTurn(call, std::move(score), tenant, std::move(trace));
  if (const absl::Status status = TakeTextOrTokens(request, turn.get()); !status.ok()) {
    return driver_->Reject(*turn, status);
  }
  kind->TakeLast(&turn->prompt);
  if (turn->prompt.empty()) return kind->Answer(*turn);  // Nothing comes before it.
  SubmitFed(std::move(turn));
}

void TurnManager::ScoreDocument(CallId call, const Document& document,
                                std::shared_ptr<ResponseStream<v1::ScoreDocumentResponse>> stream,
                                const std::string& tenant, std::shared_ptr<TurnTrace> trace) {
  auto scoring = std::make_unique<DocumentCall>(std::move(stream));
  DocumentCall* const kind = scoring.get();
  auto turn = NewTurn(call, std::move(scoring), tenant, std::move(trace));
  if (const absl::Status status = ChooseModel(document.model, document.initial_state, turn.get()); !status.ok()) {
    return driver_->Reject(*turn, status);
  }
  absl::StatusOr<std::vector<uint32_t>> tokens = MakeDocumentTokens(document, *turn->model, driver_->options().limits);
  if (!tokens.ok()) return driver_->Reject(*turn, tokens.status());
  turn->prompt = *std::move(tokens);
  turn->input_field = document.text.empty() ? "token_ids" : "text";
  kind->TakeLast(&turn->prompt);
  if (turn->prompt.empty()) {  // Nothing comes before it.
    kind->Send(*turn);
    return kind->Close(absl::OkStatus());
  }
  SubmitFed(std::move(turn));
}

void TurnManager::Logits(CallId call, const v1::LogitsRequest& request,
                         std::shared_ptr<ResponseStream<v1::LogitsResponse>> stream, const std::string& tenant,
                         std::shared_ptr<TurnTrace> trace) {
  auto turn = NewTurn(call, std::make_unique<LogitsCall>(std::move(stream)), tenant, std::move(trace));
  if (!driver_->options().allow_logits) {
    return driver_->Reject(*turn, absl::PermissionDeniedError("this router runs without --allow_logits"));
  }
  if (const absl::Status status = TakeInput(request, nullptr, &request.tokens(), turn.get()); !status.ok()) {
    return driver_->Reject(*turn, status);
  }
  SubmitFed(std::move(turn));
}

void TurnManager::Embed(CallId call, const v1::EmbedRequest& request,
                        std::function<void(absl::StatusOr<v1::EmbedResponse>)> done, const std::string& tenant,
                        std::shared_ptr<TurnTrace> trace) {
  auto turn = NewTurn(call, std::make_unique<EmbedCall>(request, std::move(done)), tenant, std::move(trace));
  if (!v1::EmbedSource_IsValid(request.source())) {
    return driver_->Reject(*turn, common::InvalidFieldError("source", absl::StrCat("there is no ", request.source())));
  }
  if (const absl::Status status = TakeTextOrTokens(request, turn.get()); !status.ok()) {
    return driver_->Reject(*turn, status);
  }
  SubmitFed(std::move(turn));
}

void TurnManager::Export(CallId call, const std::string& session_id,
                         std::function<void(absl::StatusOr<ExportedState>)> done, std::shared_ptr<TurnTrace> trace) {
  auto turn = NewTurn(call, std::make_unique<ExportCall>(std::move(done)), TenantOf(session_id), std::move(trace));
  turn->session_id = session_id;
  if (const absl::Status status = CheckSessionId("session_id", session_id); !status.ok()) {
    return driver_->Reject(*turn, status);
  }
  absl::StatusOr<std::shared_ptr<const ServingModel>> model = ModelOrWhyNot();
  // The session says which, once it is opened.
  if (absl::IsInvalidArgument(model.status())) model = driver_->model();
  if (!model.ok()) return driver_->Reject(*turn, model.status());
  turn->model = *model;
  driver_->Submit(std::move(turn));
}

void TurnManager::Exclusive(CallId call, const std::string& session_id, bool deletes, ExclusiveJob job,
                            std::function<void(absl::Status)> done, std::shared_ptr<TurnTrace> trace) {
  auto turn = NewTurn(call, std::make_unique<ExclusiveCall>(std::move(job), deletes, std::move(done)),
                      TenantOf(session_id), std::move(trace));
  turn->session_id = session_id;
  if (const absl::Status status = CheckSessionId("session_id", session_id); !status.ok()) {
    return driver_->Reject(*turn, status);
  }
  driver_->Submit(std::move(turn));
}

}  // namespace rwkv::router
