#include "services/common/grpc_status.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/any.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace rwkv::common {
namespace {

constexpr char kTypePrefix[] = "type.googleapis.com/google.rpc.";
constexpr char kErrorDomain[] = "rwkv.v1";

// Bytes of the UTF-8 character at the front of `text` (not empty), or 0 if there is no well-formed one (RFC 3629).
size_t CharacterBytes(absl::string_view text) {
  const auto byte = [text](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0; };
  const auto is_tail = [&](size_t i) { return (byte(i) & 0xc0) == 0x80; };
  const int b0 = byte(0);
  if (b0 < 0x80) return 1;
  if (b0 >= 0xc2 && b0 <= 0xdf) return is_tail(1) ? 2 : 0;
  if (b0 >= 0xe0 && b0 <= 0xef) {
    if (b0 == 0xe0 && byte(1) < 0xa0) return 0;  // Overlong.
    if (b0 == 0xed && byte(1) > 0x9f) return 0;  // Surrogates.
    return is_tail(1) && is_tail(2) ? 3 : 0;
  }
  if (b0 >= 0xf0 && b0 <= 0xf4) {
    if (b0 == 0xf0 && byte(1) < 0x90) return 0;  // Overlong.
    if (b0 == 0xf4 && byte(1) > 0x8f) return 0;  // Beyond U+10FFFF.
    return is_tail(1) && is_tail(2) && is_tail(3) ? 4 : 0;
  }
  return 0;
}

// Valid UTF-8 of at most kMaxStatusMessageBytes.
std::string CleanMessage(absl::string_view message) {
  constexpr absl::string_view kEllipsis = "...";
  std::string out;
  size_t cut = 0;  // Where `out` ends if it must be cut: the last place with room for the ellipsis.
  while (!message.empty()) {
    const size_t bytes = CharacterBytes(message);
    const absl::string_view character = bytes == 0 ? absl::string_view("?") : message.substr(0, bytes);
    if (out.size() + character.size() > kMaxStatusMessageBytes) {
      out.resize(cut);
      out.append(kEllipsis.data(), kEllipsis.size());
      return out;
    }
    out.append(character.data(), character.size());
    if (out.size() + kEllipsis.size() <= kMaxStatusMessageBytes) cut = out.size();
    message.remove_prefix(bytes == 0 ? 1 : bytes);
  }
  return out;
}

grpc::StatusCode ToGrpcCode(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return grpc::StatusCode::OK;
    case absl::StatusCode::kCancelled:
      return grpc::StatusCode::CANCELLED;
    case absl::StatusCode::kUnknown:
      return grpc::StatusCode::UNKNOWN;
    case absl::StatusCode::kInvalidArgument:
      return grpc::StatusCode::INVALID_ARGUMENT;
    case absl::StatusCode::kDeadlineExceeded:
      return grpc::StatusCode::DEADLINE_EXCEEDED;
    case absl::StatusCode::kNotFound:
      return grpc::StatusCode::NOT_FOUND;
    case absl::StatusCode::kAlreadyExists:
      return grpc::StatusCode::ALREADY_EXISTS;
    case absl::StatusCode::kPermissionDenied:
      return grpc::StatusCode::PERMISSION_DENIED;
    case absl::StatusCode::kResourceExhausted:
      return grpc::StatusCode::RESOURCE_EXHAUSTED;
    case absl::StatusCode::kFailedPrecondition:
      return grpc::StatusCode::FAILED_PRECONDITION;
    case absl::StatusCode::kAborted:
      return grpc::StatusCode::ABORTED;
    case absl::StatusCode::kOutOfRange:
      return grpc::StatusCode::OUT_OF_RANGE;
    case absl::StatusCode::kUnimplemented:
      return grpc::StatusCode::UNIMPLEMENTED;
    case absl::StatusCode::kInternal:
      return grpc::StatusCode::INTERNAL;
    case absl::StatusCode::kUnavailable:
      return grpc::StatusCode::UNAVAILABLE;
    case absl::StatusCode::kDataLoss:
      return grpc::StatusCode::DATA_LOSS;
    case absl::StatusCode::kUnauthenticated:
      return grpc::StatusCode::UNAUTHENTICATED;
    default:
      return grpc::StatusCode::UNKNOWN;
  }
}

// Also for the numbers of google.rpc.Code, which are the same.
absl::StatusCode FromGrpcCode(int code) {
  switch (code) {
    case grpc::StatusCode::OK:
      return absl::StatusCode::kOk;
    case grpc::StatusCode::CANCELLED:
      return absl::StatusCode::kCancelled;
    case grpc::StatusCode::UNKNOWN:
      return absl::StatusCode::kUnknown;
    case grpc::StatusCode::INVALID_ARGUMENT:
      return absl::StatusCode::kInvalidArgument;
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return absl::StatusCode::kDeadlineExceeded;
    case grpc::StatusCode::NOT_FOUND:
      return absl::StatusCode::kNotFound;
    case grpc::StatusCode::ALREADY_EXISTS:
      return absl::StatusCode::kAlreadyExists;
    case grpc::StatusCode::PERMISSION_DENIED:
      return absl::StatusCode::kPermissionDenied;
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return absl::StatusCode::kResourceExhausted;
    case grpc::StatusCode::FAILED_PRECONDITION:
      return absl::StatusCode::kFailedPrecondition;
    case grpc::StatusCode::ABORTED:
      return absl::StatusCode::kAborted;
    case grpc::StatusCode::OUT_OF_RANGE:
      return absl::StatusCode::kOutOfRange;
    case grpc::StatusCode::UNIMPLEMENTED:
      return absl::StatusCode::kUnimplemented;
    case grpc::StatusCode::INTERNAL:
      return absl::StatusCode::kInternal;
    case grpc::StatusCode::UNAVAILABLE:
      return absl::StatusCode::kUnavailable;
    case grpc::StatusCode::DATA_LOSS:
      return absl::StatusCode::kDataLoss;
    case grpc::StatusCode::UNAUTHENTICATED:
      return absl::StatusCode::kUnauthenticated;
    default:
      return absl::StatusCode::kUnknown;
  }
}

// "google.rpc.RetryInfo" -> "type.googleapis.com/google.rpc.RetryInfo".
std::string TypeUrl(const google::protobuf::Message& message) {
  return absl::StrCat("type.googleapis.com/", std::string(message.GetDescriptor()->full_name()));
}

void SetDetail(absl::Status* status, const google::protobuf::Message& detail) {
  status->SetPayload(TypeUrl(detail), absl::Cord(detail.SerializeAsString()));
}

template <typename Detail>
absl::optional<Detail> GetDetail(const absl::Status& status) {
  Detail detail;
  const absl::optional<absl::Cord> payload = status.GetPayload(TypeUrl(detail));
  if (!payload.has_value() || !detail.ParseFromString(std::string(*payload))) return absl::nullopt;
  return detail;
}

// The details of `status` by type name, as far as they fit.
std::vector<google::protobuf::Any> Details(const absl::Status& status) {
  std::vector<google::protobuf::Any> details;
  status.ForEachPayload([&](absl::string_view type_url, const absl::Cord& payload) {
    if (!absl::StartsWith(type_url, kTypePrefix)) return;
    google::protobuf::Any& any = details.emplace_back();
    any.set_type_url(std::string(type_url));
    any.set_value(std::string(payload));
  });
  std::sort(details.begin(), details.end(), [](const auto& a, const auto& b) { return a.type_url() < b.type_url(); });
  size_t bytes = 0;
  std::vector<google::protobuf::Any> kept;
  for (google::protobuf::Any& any : details) {
    if (bytes + any.ByteSizeLong() > kMaxStatusDetailsBytes) continue;
    bytes += any.ByteSizeLong();
    kept.push_back(std::move(any));
  }
  return kept;
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const grpc::StatusCode code = ToGrpcCode(status.code());
  const std::string message = CleanMessage(status.message());
  const std::vector<google::protobuf::Any> details = Details(status);
  if (details.empty()) return grpc::Status(code, message);
  google::rpc::Status rpc_status;
  rpc_status.set_code(code);
  rpc_status.set_message(message);
  for (const google::protobuf::Any& any : details) *rpc_status.add_details() = any;
  return grpc::Status(code, message, rpc_status.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::StatusCode code = FromGrpcCode(status.error_code());
  if (code == absl::StatusCode::kUnknown && status.error_message() == "Stream removed") {
    code = absl::StatusCode::kUnavailable;
  }
  absl::Status result(code, CleanMessage(status.error_message()));
  google::rpc::Status rpc_status;
  if (!status.error_details().empty() && rpc_status.ParseFromString(status.error_details())) {
    for (const google::protobuf::Any& any : rpc_status.details()) {
      if (absl::StartsWith(any.type_url(), kTypePrefix)) result.SetPayload(any.type_url(), absl::Cord(any.value()));
    }
  }
  return result;
}

v1::StatusProto ToStatusProto(const absl::Status& status) {
  v1::StatusProto proto;
  proto.set_code(ToGrpcCode(status.code()));
  proto.set_message(CleanMessage(status.message()));
  return proto;
}

absl::Status FromStatusProto(const v1::StatusProto& proto) {
  return absl::Status(FromGrpcCode(proto.code()), CleanMessage(proto.message()));
}

absl::Status InvalidFieldError(absl::string_view field, absl::string_view description) {
  absl::Status status = absl::InvalidArgumentError(absl::StrCat(field, ": ", description));
  google::rpc::BadRequest detail;
  google::rpc::BadRequest::FieldViolation* violation = detail.add_field_violations();
  violation->set_field(CleanMessage(field));
  violation->set_description(CleanMessage(description));
  SetDetail(&status, detail);
  return status;
}

absl::Status WithRetryInfo(absl::Status status, absl::Duration delay) {
  if (status.ok()) return status;
  // The bounds of google.protobuf.Duration do not matter here; a day is longer than any sensible retry.
  delay = std::clamp(delay, absl::ZeroDuration(), absl::Hours(24));
  google::rpc::RetryInfo detail;
  const int64_t seconds = absl::IDivDuration(delay, absl::Seconds(1), &delay);
  detail.mutable_retry_delay()->set_seconds(seconds);
  detail.mutable_retry_delay()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(delay)));
  SetDetail(&status, detail);
  return status;
}

absl::Status WithErrorInfo(absl::Status status, absl::string_view reason,
                           const std::map<std::string, std::string>& metadata) {
  if (status.ok()) return status;
  google::rpc::ErrorInfo detail;
  detail.set_reason(CleanMessage(reason));
  detail.set_domain(kErrorDomain);
  for (const auto& [key, value] : metadata) (*detail.mutable_metadata())[CleanMessage(key)] = CleanMessage(value);
  SetDetail(&status, detail);
  return status;
}

absl::optional<absl::Duration> GetRetryDelay(const absl::Status& status) {
  const auto detail = GetDetail<google::rpc::RetryInfo>(status);
  if (!detail.has_value() || !detail->has_retry_delay()) return absl::nullopt;
  return absl::Seconds(detail->retry_delay().seconds()) + absl::Nanoseconds(detail->retry_delay().nanos());
}

absl::optional<std::string> GetErrorReason(const absl::Status& status) {
  const auto detail = GetDetail<google::rpc::ErrorInfo>(status);
  if (!detail.has_value()) return absl::nullopt;
  return detail->reason();
}

absl::optional<std::string> GetInvalidField(const absl::Status& status) {
  const auto detail = GetDetail<google::rpc::BadRequest>(status);
  if (!detail.has_value() || detail->field_violations().empty()) return absl::nullopt;
  return detail->field_violations(0).field();
}

absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  absl::Status result(status.code(), absl::StrCat(context, ": ", status.message()));
  status.ForEachPayload(
      [&](absl::string_view type_url, const absl::Cord& payload) { result.SetPayload(type_url, payload); });
  return result;
}

}  // namespace rwkv::common
