#include "services/router/rpc/import_call.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/session_state.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_input.h"
#include "services/state_store/client/crc32c.h"

namespace rwkv::router {
namespace {

using checkpoint::MappedFile;
using checkpoint::SessionState;
using checkpoint::StateModel;

constexpr size_t kMaxPieceBytes = 1 << 20;
constexpr absl::Duration kStoreTimeout = absl::Seconds(60);  // For all records and the session.
constexpr absl::Duration kCleanUpTimeout = absl::Seconds(5);

// A file that has no place on any disk.
class MemoryFile {
 public:
  MemoryFile() = default;
  ~MemoryFile() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  int64_t size() const { return size_; }
  uint32_t crc32c() const { return crc32c_; }

  absl::Status Append(absl::string_view bytes) {
    if (descriptor_ < 0) descriptor_ = memfd_create("state to import", MFD_CLOEXEC);
    crc32c_ = state_store::ExtendCrc32c(crc32c_, bytes);
    while (!bytes.empty()) {
      const ssize_t written = descriptor_ < 0 ? -1 : write(descriptor_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR && descriptor_ >= 0) continue;
      if (written <= 0) {
        return absl::ResourceExhaustedError(absl::StrCat("no memory for ", size_ + bytes.size(), " bytes of a state"));
      }
      size_ += written;
      bytes.remove_prefix(static_cast<size_t>(written));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<MappedFile>> Map() {
    return MappedFile::OfDescriptor(std::exchange(descriptor_, -1), "the file");
  }

 private:
  int descriptor_ = -1;
  int64_t size_ = 0;
  uint32_t crc32c_ = 0;
};

StateModel ToStateModel(const ServingModel& model) {
  StateModel state;
  state.fingerprint = model.info.fingerprint();
  state.layer_count = model.info.layer_count();
  state.vocab_size = model.info.vocab_size();
  for (const v1::StateTensor& tensor : model.state_layout) {
    state.layout.push_back({tensor.name(), {tensor.shape().begin(), tensor.shape().end()}});
  }
  return state;
}

class ImportReactor final : public grpc::ServerReadReactor<v1::SessionsImportRequest> {
 public:
  ImportReactor(ImportCalls calls, absl::Time deadline, v1::SessionsImportResponse* response)
      : calls_(std::move(calls)),
        deadline_(deadline),
        response_(response),
        upload_(calls_.shares, calls_.limits, [this](const absl::Status& late) { End(late); }) {
    if (calls_.known.ok()) {
      ReadNext();
    } else {
      End(calls_.known);
    }
  }

  void OnReadDone(bool ok) override {
    if (!upload_.PieceCame()) return;
    if (!ok) {  // All of it is here. The reactor lives until Finish, which only what runs next can call.
      if (const absl::Status begun = Begin(); !begun.ok()) return End(begun);
      if (!calls_.executor->TryRun([this] { End(Import()); })) {
        End(common::WithRetryInfo(absl::ResourceExhaustedError("too many calls wait"), absl::Seconds(1)));
      }
      return;
    }
    if (const absl::Status taken = Take(); !taken.ok()) return End(taken);
    ReadNext();
  }
  void OnCancel() override { gone_ = true; }
  void OnDone() override { delete this; }

 private:
  void End(const absl::Status& status) { Finish(common::ToGrpcStatus(calls_.caller.Out(status))); }

  void ReadNext() {
    if (const absl::Status late = upload_.ExpectPiece(); !late.ok()) return End(late);
    StartRead(&piece_);
  }

  absl::Status Take() {
    if (model_ == nullptr) {
      session_id_ = piece_.session_id();
      if (!session_id_.empty()) RWKV_RETURN_IF_ERROR(Caller::CheckSessionId("session_id", session_id_));
      RWKV_ASSIGN_OR_RETURN(model_, calls_.turns->ModelOrWhyNot(piece_.model()));
      RWKV_RETURN_IF_ERROR(calls_.caller.CheckModel(model_->info));
    }
    if (piece_.has_crc32c()) crc32c_ = piece_.crc32c();
    if (piece_.data().size() > kMaxPieceBytes) {
      return common::InvalidFieldError("data", absl::StrCat(piece_.data().size(), " bytes; at most ", kMaxPieceBytes));
    }
    const int64_t limit = ToStateModel(*model_).MaxFileBytes();
    const auto bytes = static_cast<int64_t>(piece_.data().size());
    if (bytes == 0) return absl::OkStatus();
    if (bytes > limit - file_.size()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the file has more than ", limit, " bytes; no state of this model is larger"));
    }
    RWKV_RETURN_IF_ERROR(upload_.Keep(bytes));
    return file_.Append(piece_.data());
  }

  absl::Status Begin() {
    if (file_.size() == 0) return common::InvalidFieldError("data", "the file is empty");
    if (crc32c_.has_value() && *crc32c_ != file_.crc32c()) {
      return common::InvalidFieldError(
          "crc32c", absl::StrCat("says ", absl::Hex(*crc32c_, absl::kZeroPad8), "; the ", file_.size(),
                                 " bytes that came have ", absl::Hex(file_.crc32c(), absl::kZeroPad8)));
    }
    return upload_.BeginWork();
  }

  absl::Time StoreDeadline() const { return std::min(deadline_, absl::Now() + kStoreTimeout); }

  absl::Status Import() {
    const common::ScopedTrace scope(calls_.trace);
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, file_.Map());
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<const SessionState> state,
                          SessionState::Open(std::move(file), ToStateModel(*model_)));
    const uint64_t max_tokens = model_->info.max_context_tokens();
    if (max_tokens != 0 && state->position() >= max_tokens) {
      return absl::FailedPreconditionError(
          absl::StrCat("the state has seen ", state->position(), " tokens; the model takes ", max_tokens));
    }
    v1::ImportSessionRequest request;
    request.set_session_id(calls_.caller.In(session_id_.empty() ? calls_.new_session_id() : session_id_));
    request.mutable_token_ids()->Add(state->token_ids().begin(), state->token_ids().end());
    // With all of its log, and where that can be fed again, it is a session like others. Else nothing stands for it.
    const bool offered = CheckOffered(state->initial_state(), model_->info).ok();
    request.set_base(request.token_ids().empty() || !offered);
    if (!request.base()) request.set_initial_state(state->initial_state());

    const absl::Time deadline = StoreDeadline();
    RWKV_RETURN_IF_ERROR(calls_.caller.CheckStorage(deadline));
    v1::GetSessionRequest get;
    get.set_session_id(request.session_id());
    const absl::StatusOr<v1::GetSessionResponse> taken = calls_.catalog->GetSession(get, deadline);
    if (taken.ok()) return absl::AlreadyExistsError(absl::StrCat("session ", request.session_id(), " exists already"));
    if (!absl::IsNotFound(taken.status())) return taken.status();

    v1::SnapshotManifest& manifest = *request.mutable_manifest();
    manifest.set_snapshot_id(calls_.new_snapshot_id());
    manifest.set_session_id(request.session_id());
    manifest.set_position(state->position());
    manifest.set_model_fingerprint(model_->info.fingerprint());
    absl::Status status = Store(*state, deadline, &request);
    if (status.ok()) return status;
    common::LogWarning("import_failed", {{"session", request.session_id()}, {"status", status}});
    // Not if the session is there after all, and only the answer was lost: the store knows.
    v1::DropSnapshotRequest drop;
    drop.set_snapshot_id(manifest.snapshot_id());
    (void)calls_.catalog->DropSnapshot(drop, absl::Now() + kCleanUpTimeout);  // Else it is swept as an orphan.
    return status;
  }

  absl::Status Store(const SessionState& state, absl::Time deadline, v1::ImportSessionRequest* request) {
    v1::SnapshotManifest& manifest = *request->mutable_manifest();
    for (int layer = 0; layer < model_->info.layer_count(); ++layer) {
      if (gone_) return absl::CancelledError("the client is gone");
      RWKV_ASSIGN_OR_RETURN(const std::string record, state.Record(layer));
      v1::RecordInfo& info = *manifest.add_records();
      info.set_snapshot_id(manifest.snapshot_id());
      info.set_layer(layer);
      info.set_bytes(record.size());
      info.set_crc32c(state_store::Crc32c(record));
      RWKV_RETURN_IF_ERROR(calls_.records->PutRecord(info, record, nullptr, deadline));
    }
    if (gone_) return absl::CancelledError("the client is gone");
    RWKV_ASSIGN_OR_RETURN(v1::ImportSessionResponse imported, calls_.catalog->ImportSession(*request, deadline));
    *response_->mutable_session() = std::move(*imported.mutable_session());
    calls_.caller.Out(response_->mutable_session());
    return absl::OkStatus();
  }

  const ImportCalls calls_;
  const absl::Time deadline_;
  v1::SessionsImportResponse* const response_;
  std::atomic<bool> gone_{false};
  Upload upload_;
  v1::SessionsImportRequest piece_;
  std::shared_ptr<const ServingModel> model_;  // From the first message on.
  std::string session_id_;
  absl::optional<uint32_t> crc32c_;
  MemoryFile file_;
};

}  // namespace

grpc::ServerReadReactor<v1::SessionsImportRequest>* NewImportCall(ImportCalls calls, absl::Time deadline,
                                                                  v1::SessionsImportResponse* response) {
  return new ImportReactor(std::move(calls), deadline, response);
}

}  // namespace rwkv::router
