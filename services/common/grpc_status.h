// The one place where absl::Status and grpc::Status become each other, and where google.rpc error details are written
// and read. Details live in an absl::Status as payloads under "type.googleapis.com/google.rpc.*" and cross the wire in
// grpc's error_details, a serialized google.rpc.Status. All functions are pure and thread-safe.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "grpcpp/support/status.h"
#include "rwkv/v1/common.pb.h"

namespace rwkv::common {

// A longer message is cut at the last whole UTF-8 character and ends in "...". Invalid UTF-8 becomes '?', because
// gRPC and protobuf carry text only.
inline constexpr size_t kMaxStatusMessageBytes = 1024;
// Details beyond this (in the order of type names) are left out: they travel in HTTP trailers, of which gRPC takes 8
// KiB.
inline constexpr size_t kMaxStatusDetailsBytes = 2048;

grpc::Status ToGrpcStatus(const absl::Status& status);

// An unknown code becomes kUnknown. "Stream removed" under UNKNOWN, which gRPC says when a peer dies mid-call, becomes
// kUnavailable. Details that do not parse are dropped.
absl::Status FromGrpcStatus(const grpc::Status& status);

// For statuses inside messages. Code and message only, the message cut as above.
v1::StatusProto ToStatusProto(const absl::Status& status);
absl::Status FromStatusProto(const v1::StatusProto& proto);

// kInvalidArgument "field: description" with a google.rpc.BadRequest that names the field ("sampling.top_p").
absl::Status InvalidFieldError(absl::string_view field, absl::string_view description);

// Adds google.rpc.RetryInfo: come back after `delay` (>= 0). An OK status stays as it is.
absl::Status WithRetryInfo(absl::Status status, absl::Duration delay);

// Adds google.rpc.ErrorInfo with domain "rwkv.v1". `reason` is UPPER_SNAKE_CASE and constant, for programs to switch
// on.
absl::Status WithErrorInfo(absl::Status status, absl::string_view reason,
                           const std::map<std::string, std::string>& metadata = {});

absl::optional<absl::Duration> GetRetryDelay(const absl::Status& status);
absl::optional<std::string> GetErrorReason(const absl::Status& status);
// The first field of the BadRequest.
absl::optional<std::string> GetInvalidField(const absl::Status& status);

// `status` with "context: " before its message; code and details stay. An OK status stays as it is.
absl::Status Annotate(const absl::Status& status, absl::string_view context);

}  // namespace rwkv::common
