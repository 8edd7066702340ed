#include "services/rwkvctl/session_file.h"

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/session_state.h"
#include "services/common/grpc_status.h"
#include "services/rwkvctl/progress_bar.h"
#include "services/rwkvctl/safetensors_writer.h"

namespace rwkv::rwkvctl {
namespace {

constexpr uint32_t kTokensPerCall = 8192;  // As `sessions show` takes them.

std::ostream* Watched(Context& context) { return context.err_is_terminal ? &context.err : nullptr; }

// "blocks.7.att.state" is 7; -1: not of a layer.
int LayerOf(absl::string_view tensor) {
  int layer = -1;
  if (!absl::ConsumePrefix(&tensor, "blocks.") || !absl::SimpleAtoi(tensor.substr(0, tensor.find('.')), &layer)) {
    return -1;
  }
  return layer;
}

absl::StatusOr<int> LayersServed(router::RouterClient& client) {
  absl::StatusOr<v1::ListModelsResponse> models = client.ListModels();
  if (!models.ok()) return models.status();
  return models->models_size() == 0 ? 0 : models->models(0).layer_count();
}

struct State {
  TensorCollector tensors;
  absl::optional<uint64_t> position;
  std::string model_fingerprint;
};

absl::StatusOr<State> ReadState(Context& context, const std::string& session_id) {
  State state;
  v1::SessionsExportStateRequest request;
  request.set_session_id(session_id);
  absl::StatusOr<int> layers = LayersServed(*context.client);
  if (!layers.ok()) return layers.status();
  ProgressBar bar(Watched(context), "state");
  const auto take = [&](const v1::SessionsExportStateResponse& response) {
    if (state.position.value_or(response.position()) != response.position()) {
      return absl::DataLossError(absl::StrCat("the state's position changes from ", *state.position, " to ",
                                              response.position(), " at tensor ", response.tensor()));
    }
    state.position = response.position();
    state.model_fingerprint = response.model_fingerprint();
    if (*layers > 0) bar.Update(std::max(0, LayerOf(response.tensor())), *layers);
    const std::vector<int64_t> shape(response.shape().begin(), response.shape().end());
    return state.tensors.Add(response.tensor(), shape, response.offset_bytes(), response.data());
  };
  absl::Status status = context.client->ExportState(request, take);
  if (status.ok()) status = state.tensors.Finish();
  if (!status.ok()) return status;
  return state;
}

// The first `count` tokens of the session, as the file has them.
absl::StatusOr<std::string> ReadLog(Context& context, const std::string& session_id, uint64_t count) {
  std::string bytes;
  v1::SessionsGetRequest request;
  request.set_session_id(session_id);
  ProgressBar bar(Watched(context), "tokens");
  for (uint64_t begin = 0; begin < count;) {
    request.set_tokens_begin(begin);
    request.set_tokens_count(static_cast<uint32_t>(std::min<uint64_t>(kTokensPerCall, count - begin)));
    absl::StatusOr<v1::SessionsGetResponse> response = context.client->GetSession(request);
    if (!response.ok()) return response.status();
    if (response->token_ids_size() != static_cast<int>(request.tokens_count())) {
      return absl::AbortedError(absl::StrCat("session ", session_id, " changed while it was read; try again"));
    }
    for (const uint32_t id : response->token_ids()) {
      for (int byte = 0; byte < 4; ++byte) bytes.push_back(static_cast<char>(id >> (8 * byte) & 0xFF));
    }
    begin += request.tokens_count();
    bar.Update(begin, count);
  }
  return bytes;
}

absl::StatusOr<v1::Session> Describe(Context& context, const std::string& session_id) {
  v1::SessionsGetRequest request;
  request.set_session_id(session_id);
  absl::StatusOr<v1::SessionsGetResponse> response = context.client->GetSession(request);
  if (!response.ok()) return response.status();
  return std::move(*response->mutable_session());
}

}  // namespace

absl::StatusOr<ExportedSession> ExportSession(Context& context, const std::string& session_id, bool with_log,
                                              const std::string& path) {
  absl::StatusOr<v1::Session> before = Describe(context, session_id);
  if (!before.ok()) return before.status();
  absl::StatusOr<State> state = ReadState(context, session_id);
  if (!state.ok()) return state.status();
  std::vector<Tensor> tensors = state->tensors.tensors();

  ExportedSession exported;
  exported.position = *state->position;
  // What stands on an imported state is not of its tokens alone.
  exported.has_log = with_log && !before->has_base_position() && exported.position > 0 &&
                     exported.position <= static_cast<uint64_t>(checkpoint::kMaxSessionTokens);
  if (exported.has_log) {
    absl::StatusOr<std::string> log = ReadLog(context, session_id, exported.position);
    if (!log.ok()) return log.status();
    tensors.push_back(
        {checkpoint::kSessionTokensTensor, {static_cast<int64_t>(exported.position)}, *std::move(log), "I32"});
  }
  // State and tokens belong together if nothing was written in between.
  absl::StatusOr<v1::Session> after = Describe(context, session_id);
  if (!after.ok()) return after.status();
  if (after->token_count() != exported.position ||
      after->update_time().SerializeAsString() != before->update_time().SerializeAsString()) {
    return absl::AbortedError(absl::StrCat("session ", session_id, " went on while it was exported; try again"));
  }

  std::vector<absl::string_view> payload;
  for (const Tensor& tensor : tensors) payload.push_back(tensor.data);
  const std::map<std::string, std::string> metadata = {
      {"position", absl::StrCat(exported.position)},       {"session", session_id},
      {"model_fingerprint", state->model_fingerprint},     {"initial_state", before->initial_state()},
      {"xxh3", checkpoint::SessionStateChecksum(payload)},
  };
  absl::StatusOr<uint64_t> bytes = WriteSafetensors(path, tensors, metadata);
  if (!bytes.ok()) return bytes.status();
  exported.bytes = *bytes;
  return exported;
}

absl::StatusOr<v1::Session> ImportSession(Context& context, const std::string& path, const std::string& session_id) {
  absl::StatusOr<std::unique_ptr<checkpoint::MappedFile>> file = checkpoint::MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const absl::string_view bytes(reinterpret_cast<const char*>((*file)->bytes().data()), (*file)->bytes().size());
  absl::StatusOr<v1::Session> session = absl::UnknownError("");
  {
    ProgressBar bar(Watched(context), "import");
    session = context.client->ImportSession(session_id, bytes, [&](uint64_t sent) { bar.Update(sent, bytes.size()); });
  }
  if (session.ok()) return session;
  return common::Annotate(session.status(), path);
}

}  // namespace rwkv::rwkvctl
