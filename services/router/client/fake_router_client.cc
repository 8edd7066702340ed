#include "services/router/client/fake_router_client.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"

namespace rwkv::router {
namespace {

std::vector<uint32_t> BytesToIds(const std::string& bytes) {
  std::vector<uint32_t> ids;
  for (char c : bytes) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

float Logprob(uint32_t id) { return -static_cast<float>(id + 1) / 256; }

absl::Status NoTokenizer() { return absl::FailedPreconditionError("the model has no tokenizer"); }

}  // namespace

absl::Status FakeRouterClient::Generate(const v1::GenerateRequest& request, GenerateCallback callback,
                                        Cancellation* cancellation, absl::Time deadline) {
  state_->generate_requests.push_back(request);
  state_->generate_deadlines.push_back(deadline);
  if (!state_->first_statuses.empty()) {
    const absl::Status status = state_->first_statuses.front();
    state_->first_statuses.erase(state_->first_statuses.begin());
    return status;
  }
  std::vector<uint32_t> input = BytesToIds(request.text());
  if (request.has_tokens()) input.assign(request.tokens().ids().begin(), request.tokens().ids().end());
  const bool has_input = request.input_case() != v1::GenerateRequest::INPUT_NOT_SET;
  if (has_input && input.empty())
    return common::InvalidFieldError(request.has_tokens() ? "tokens" : "text", "is empty");
  if (!has_input && request.session_id().empty()) return common::InvalidFieldError("input", "is missing");
  std::vector<uint32_t> forgotten;
  std::vector<uint32_t>* log = &forgotten;
  if (!request.session_id().empty()) {
    absl::StatusOr<std::vector<uint32_t>*> found = Find(request.session_id());
    if (!found.ok()) return found.status();
    log = *found;
  }
  NamedTurn unnamed;
  NamedTurn* turn = &unnamed;
  const std::pair<std::string, std::string> name(request.session_id(), request.request_id());
  const bool known = !request.request_id().empty() && state_->turns.count(name) > 0;
  if (known) {
    turn = &state_->turns.at(name);
    if (turn->input != input) return common::InvalidFieldError("request_id", "names a turn with another input");
  } else {
    if (!has_input && log->empty()) return common::InvalidFieldError("input", "is missing, and the session is empty");
    if (request.resume_from() > 0) return absl::OutOfRangeError("resume_from of a turn that is not known");
    if (!request.request_id().empty()) turn = &state_->turns[name];
    turn->input = input;
    std::string& unsaid = state_->unsaid[request.session_id()];
    if (!has_input && !unsaid.empty()) {
      turn->answer = unsaid;
    } else if (state_->answer_to) {
      turn->answer = state_->answer_to(std::string(input.begin(), input.end()));
    } else {
      turn->answer = state_->answer;
    }
    unsaid.clear();
    log->insert(log->end(), input.begin(), input.end());
  }
  if (request.resume_from() > turn->said.size()) return absl::OutOfRangeError("resume_from beyond the turn's tokens");

  // The stop string is generated too, and not shown.
  const size_t shown = turn->answer.size();
  const std::string answer = turn->answer + (request.stop_size() > 0 ? request.stop(0) : std::string());
  const uint64_t max_tokens = request.has_max_tokens() ? request.max_tokens() : 256;
  const uint64_t count = std::min<uint64_t>(max_tokens, answer.size());
  for (uint64_t index = request.resume_from(); index < count; ++index) {
    if (state_->on_token) state_->on_token(index);
    if (cancellation != nullptr && cancellation->cancelled()) return absl::CancelledError("cancelled");
    v1::GenerateResponse response;
    response.set_index(index);
    response.set_token_id(static_cast<unsigned char>(answer[index]));
    if (state_->has_tokenizer && index < shown) response.set_text(answer.substr(index, 1));
    response.set_logprob(-0.5f * static_cast<float>(index + 1));
    for (uint32_t n = 0; n < request.sampling().top_logprobs(); ++n) {
      v1::TokenLogprob* logprob = response.add_top_logprobs();
      logprob->set_token_id(n);
      logprob->set_logprob(-static_cast<float>(n));
    }
    if (index == turn->said.size()) {
      turn->said.push_back(response.token_id());
      log->push_back(response.token_id());
    }
    if (absl::Status status = callback(response); !status.ok()) return status;
  }
  if (!state_->generate_status.ok()) return state_->generate_status;
  v1::GenerateResponse last;
  last.set_index(count);
  v1::Finish& finish = *last.mutable_finish();
  finish.set_reason(v1::FINISH_REASON_LENGTH);
  if (count == answer.size() && request.stop_size() > 0) {
    finish.set_reason(v1::FINISH_REASON_STOP_STRING);
    finish.set_stop_string(request.stop(0));
  } else if (!turn->finished && count < shown) {
    state_->unsaid[request.session_id()] = turn->answer.substr(count);
  }
  turn->finished = true;
  finish.set_prompt_tokens(static_cast<uint32_t>(input.size()));
  finish.set_generated_tokens(static_cast<uint32_t>(count));
  finish.set_session_id(request.session_id());
  finish.set_request_id(request.request_id());
  if (!request.session_id().empty()) finish.set_session_tokens(log->size());
  finish.set_seed(request.sampling().seed());
  finish.mutable_queue_time()->set_nanos(1000000);
  finish.mutable_prefill_time()->set_nanos(250000000);
  finish.mutable_decode_time()->set_seconds(1);
  return callback(last);
}

absl::Status FakeRouterClient::Logits(const v1::LogitsRequest& request, LogitsCallback callback) {
  constexpr uint32_t kVocabSize = 4;
  for (int t = 0; t < request.tokens().ids_size(); ++t) {
    v1::LogitsResponse response;
    response.set_first_row(t);
    response.set_rows(1);
    response.set_vocab_size(kVocabSize);
    for (uint32_t i = 0; i < kVocabSize; ++i) {
      const float logit = static_cast<float>(request.tokens().ids(t)) + 0.25f * static_cast<float>(i);
      char bytes[sizeof(logit)];
      std::memcpy(bytes, &logit, sizeof(logit));
      response.mutable_logits()->append(bytes, sizeof(bytes));
    }
    if (absl::Status status = callback(response); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::ScoreResponse> FakeRouterClient::Score(const v1::ScoreRequest& request) {
  state_->score_requests.push_back(request);
  std::vector<uint32_t> ids = BytesToIds(request.text());
  if (request.has_tokens()) ids.assign(request.tokens().ids().begin(), request.tokens().ids().end());
  v1::ScoreResponse response;
  response.mutable_token_ids()->Add(ids.begin(), ids.end());
  for (size_t i = 1; i < ids.size(); ++i) response.add_logprobs(Logprob(ids[i]));
  return response;
}

absl::StatusOr<v1::EmbedResponse> FakeRouterClient::Embed(const v1::EmbedRequest& request) {
  std::vector<uint32_t> ids = BytesToIds(request.text());
  if (request.has_tokens()) ids.assign(request.tokens().ids().begin(), request.tokens().ids().end());
  if (ids.empty()) return common::InvalidFieldError("input", "is missing");
  v1::EmbedResponse response;
  for (const uint32_t value : {ids.front(), ids.back(), static_cast<uint32_t>(request.source())}) {
    response.add_values(static_cast<float>(value) * (request.normalize() ? 0.5f : 1.0f));
  }
  response.set_prompt_tokens(static_cast<uint32_t>(ids.size()));
  return response;
}

absl::Status FakeRouterClient::ScoreDocument(const v1::ScoreDocumentRequest& document, DocumentCallback callback) {
  constexpr size_t kTokensPerMessage = 3;
  state_->documents.push_back(document);
  if (!document.text().empty() && !state_->has_tokenizer) return NoTokenizer();
  std::vector<uint32_t> ids(document.token_ids().begin(), document.token_ids().end());
  const std::vector<uint32_t> text = BytesToIds(document.text());
  ids.insert(ids.end(), text.begin(), text.end());
  if (ids.empty()) return common::InvalidFieldError("text", "the document is empty");
  for (size_t first = 1; first < ids.size(); first += kTokensPerMessage) {
    v1::ScoreDocumentResponse response;
    response.set_token_count(ids.size());
    response.set_first(first);
    for (size_t i = first; i < std::min(ids.size(), first + kTokensPerMessage); ++i) {
      response.add_token_ids(ids[i]);
      response.add_logprobs(Logprob(ids[i]));
    }
    if (absl::Status status = callback(response); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::TokenizeResponse> FakeRouterClient::Tokenize(const v1::TokenizeRequest& request) {
  state_->tokenize_requests.push_back(request);
  if (!state_->has_tokenizer) return NoTokenizer();
  v1::TokenizeResponse response;
  for (uint32_t id : BytesToIds(request.data())) response.add_token_ids(id);
  return response;
}

absl::StatusOr<std::vector<uint32_t>> FakeRouterClient::TokenizeDocument(absl::string_view text) {
  if (!state_->has_tokenizer) return NoTokenizer();
  return BytesToIds(std::string(text));
}

absl::StatusOr<v1::DetokenizeResponse> FakeRouterClient::Detokenize(const v1::DetokenizeRequest& request) {
  if (!state_->has_tokenizer) return NoTokenizer();
  v1::DetokenizeResponse response;
  for (uint32_t id : request.token_ids()) response.mutable_data()->push_back(static_cast<char>(id));
  return response;
}

absl::StatusOr<v1::ListModelsResponse> FakeRouterClient::ListModels() {
  v1::ListModelsResponse response;
  v1::ModelInfo* model = response.add_models();
  model->set_name(state_->model_name);
  model->set_chat_template(state_->chat_template);
  model->set_fingerprint("00112233445566778899aabbccddeeff");
  model->set_vocab_size(256);
  if (state_->has_tokenizer) model->set_tokenizer("bytes");
  return response;
}

absl::StatusOr<std::vector<uint32_t>*> FakeRouterClient::Find(const std::string& id) {
  const auto it = state_->logs.find(id);
  if (it == state_->logs.end()) return absl::NotFoundError(absl::StrCat("no session ", id));
  return &it->second;
}

v1::Session FakeRouterClient::Describe(const std::string& id) const {
  v1::Session session;
  session.set_id(id);
  session.set_token_count(state_->logs.at(id).size());
  const auto initial_state = state_->initial_states.find(id);
  if (initial_state != state_->initial_states.end()) session.set_initial_state(initial_state->second);
  if (const auto base = state_->bases.find(id); base != state_->bases.end()) {
    session.set_base_position(base->second);
    session.set_log_begin(base->second);
    session.set_token_count(base->second + session.token_count());
  }
  return session;
}

absl::StatusOr<v1::Session> FakeRouterClient::CreateSession(const v1::SessionsCreateRequest& request) {
  const std::string id =
      request.session_id().empty() ? absl::StrCat("session-", state_->logs.size() + 1) : request.session_id();
  if (!state_->logs.try_emplace(id).second) return absl::AlreadyExistsError(absl::StrCat("session ", id, " exists"));
  state_->initial_states[id] = request.initial_state();
  return Describe(id);
}

absl::StatusOr<v1::SessionsGetResponse> FakeRouterClient::GetSession(const v1::SessionsGetRequest& request) {
  absl::StatusOr<std::vector<uint32_t>*> log = Find(request.session_id());
  if (!log.ok()) return log.status();
  v1::SessionsGetResponse response;
  *response.mutable_session() = Describe(request.session_id());
  for (uint64_t i = request.tokens_begin(); i < (*log)->size() && i - request.tokens_begin() < request.tokens_count();
       ++i) {
    response.add_token_ids((**log)[i]);
    if (state_->has_tokenizer) response.mutable_text()->push_back(static_cast<char>((**log)[i]));
  }
  return response;
}

absl::StatusOr<v1::SessionsListResponse> FakeRouterClient::ListSessions(const v1::SessionsListRequest& request) {
  // Two a page, so that callers have to turn pages.
  v1::SessionsListResponse response;
  for (auto it = state_->logs.upper_bound(request.page_token()); it != state_->logs.end(); ++it) {
    if (response.sessions_size() == 2) {
      response.set_next_page_token(response.sessions(1).id());
      break;
    }
    *response.add_sessions() = Describe(it->first);
  }
  return response;
}

absl::StatusOr<v1::Session> FakeRouterClient::ForkSession(const v1::SessionsForkRequest& request) {
  absl::StatusOr<std::vector<uint32_t>*> log = Find(request.session_id());
  if (!log.ok()) return log.status();
  const uint64_t position = request.has_position() ? request.position() : (*log)->size();
  if (position > (*log)->size()) return absl::OutOfRangeError(absl::StrCat("position ", position, " is past the end"));
  const std::string id = request.new_session_id().empty() ? request.session_id() + "-fork" : request.new_session_id();
  state_->logs[id] = std::vector<uint32_t>((*log)->begin(), (*log)->begin() + static_cast<int64_t>(position));
  v1::Session session = Describe(id);
  session.set_forked_from(request.session_id());
  session.set_fork_position(position);
  return session;
}

absl::StatusOr<v1::Session> FakeRouterClient::RewindSession(const v1::SessionsRewindRequest& request) {
  absl::StatusOr<std::vector<uint32_t>*> log = Find(request.session_id());
  if (!log.ok()) return log.status();
  if (request.position() > (*log)->size()) {
    return absl::OutOfRangeError(absl::StrCat("position ", request.position(), " is past the end"));
  }
  (*log)->resize(request.position());
  state_->unsaid.erase(request.session_id());
  return Describe(request.session_id());
}

absl::Status FakeRouterClient::DeleteSession(const v1::SessionsDeleteRequest& request) {
  if (state_->logs.erase(request.session_id()) == 0) {
    return absl::NotFoundError(absl::StrCat("no session ", request.session_id()));
  }
  return absl::OkStatus();
}

absl::Status FakeRouterClient::ExportState(const v1::SessionsExportStateRequest& request, StateCallback callback) {
  if (absl::StatusOr<std::vector<uint32_t>*> log = Find(request.session_id()); !log.ok()) return log.status();
  for (const v1::SessionsExportStateResponse& response : state_->exported_state) {
    if (absl::Status status = callback(response); !status.ok()) return status;
  }
  if (state_->on_export) state_->on_export();
  return absl::OkStatus();
}

absl::StatusOr<v1::Session> FakeRouterClient::ImportSession(const std::string& session_id, absl::string_view file,
                                                            ImportProgress progress) {
  v1::SessionsCreateRequest create;
  create.set_session_id(session_id);
  state_->imported_files.emplace_back(file);
  progress(file.size());
  return CreateSession(create);
}

absl::StatusOr<v1::GetStatusResponse> FakeRouterClient::GetStatus() {
  if (state_->on_status) RWKV_RETURN_IF_ERROR(state_->on_status());
  return state_->status;
}

absl::StatusOr<v1::GetTenantUsageResponse> FakeRouterClient::GetTenantUsage(const v1::GetTenantUsageRequest& request) {
  v1::GetTenantUsageResponse usage = state_->usage;
  if (!request.tenant().empty()) usage.set_tenant(request.tenant());
  return usage;
}

}  // namespace rwkv::router
