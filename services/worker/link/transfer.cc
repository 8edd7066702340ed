#include "services/worker/link/transfer.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"

namespace rwkv::worker {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "activations cross the wire as they lie in memory");

absl::Status CheckBytes(const char* name, const std::string& bytes, int64_t rows, int64_t width) {
  if (bytes.size() == static_cast<size_t>(rows * width) * sizeof(float)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("link: ", name, " has ", bytes.size(), " bytes, not ", rows, " rows of ", width, " floats"));
}

}  // namespace

int64_t MaxTransferBytes(const LinkShape& shape) {
  // Statuses of refused entries are cut to about 1 KiB, and there is at most one for each row that a step could have
  // had.
  constexpr int64_t kBytesPerRefusal = common::kMaxStatusMessageBytes + 64;
  constexpr int64_t kBytesPerOwnEntry = 128;
  return shape.max_rows * ((shape.width + shape.v_first_width) * static_cast<int64_t>(sizeof(float)) +
                           kBytesPerRefusal + kBytesPerOwnEntry) +
         (64 << 10);
}

v1::TransferRequest FrameToProto(const std::string& epoch, const LinkShape& shape, const LinkFrame& frame) {
  v1::TransferRequest request;
  request.set_epoch(epoch);
  const int64_t rows = frame.header.rows;
  request.set_step_id(frame.header.step_id);
  request.set_rows(static_cast<int32_t>(rows));
  request.set_width(static_cast<int32_t>(shape.width));
  if (frame.rows == nullptr) {
    request.set_hidden(frame.x, rows * shape.width * sizeof(float));
    request.set_v_first(frame.v_first, rows * shape.v_first_width * sizeof(float));
  }
  for (const RefusedEntry& refused : frame.header.refused) {
    request.add_refused_entries(refused.entry);
    *request.add_refusals() = common::ToStatusProto(refused.status);
  }
  if (frame.header.is_own()) {
    *request.mutable_own_step() = frame.header.own_step;
    request.set_commands_before(frame.header.commands_before);
  }
  return request;
}

absl::Status CheckTransfer(const v1::TransferRequest& request, const std::string& epoch, const LinkShape& shape,
                           bool rows_inside) {
  if (request.epoch() != epoch) {
    return absl::InvalidArgumentError(absl::StrCat("link: a frame of epoch ", request.epoch(), " in epoch ", epoch));
  }
  if (request.width() != shape.width || request.rows() < 0 || request.rows() > shape.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat("link: step ", request.step_id(), " is ", request.rows(), " x ",
                                                   request.width(), ", not up to ", shape.max_rows, " x ",
                                                   shape.width));
  }
  if (request.refused_entries_size() != request.refusals_size()) {
    return absl::InvalidArgumentError(absl::StrCat("link: ", request.refused_entries_size(), " refused entries with ",
                                                   request.refusals_size(), " statuses"));
  }
  const int64_t rows = rows_inside ? request.rows() : 0;
  RWKV_RETURN_IF_ERROR(CheckBytes("hidden", request.hidden(), rows, shape.width));
  return CheckBytes("v_first", request.v_first(), rows, shape.v_first_width);
}

absl::StatusOr<LinkAgreement> Agree(const v1::LinkOffer& offer, const LinkChoice& choice) {
  LinkAgreement agreement;
  DeviceLinks* const device = choice.device;
  if (choice.kind == LinkKind::kGrpc) {
    agreement.why_not = "this stage shall use gRPC";
  } else if (device == nullptr) {
    agreement.why_not = absl::StrCat("this stage: ", choice.why_none);
  } else if (offer.kind().empty()) {
    agreement.why_not = absl::StrCat("the stage before: ", offer.why_none());
  } else if (offer.kind() != device->kind() || offer.version() != device->version()) {
    agreement.why_not = absl::StrCat("the stage before has ", offer.kind(), " ", offer.version(), ", this one ",
                                     device->kind(), " ", device->version());
  } else if (offer.device() == device->device()) {
    agreement.why_not = absl::StrCat("both stages compute on ", offer.device());
  } else {
    agreement.by_device = true;
    return agreement;
  }
  if (offer.required() || choice.kind == LinkKind::kDevice) {
    return absl::FailedPreconditionError(absl::StrCat("link: no way from device to device: ", agreement.why_not));
  }
  return agreement;
}

LinkHeader HeaderOf(const v1::TransferRequest& request) {
  LinkHeader header;
  header.step_id = request.step_id();
  header.rows = request.rows();
  for (int i = 0; i < request.refused_entries_size(); ++i) {
    header.refused.push_back({request.refused_entries(i), common::FromStatusProto(request.refusals(i))});
  }
  header.own_step = request.own_step();
  header.commands_before = request.commands_before();
  return header;
}

}  // namespace rwkv::worker
