// NCCL's results as absl::Status: the one place.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/worker/link/nccl.h"

namespace rwkv::worker::nccl {

// `what`, in the message: what was wanted. `communicator` may be null. What a peer's end or a network does is
// kUnavailable, all else kInternal.
inline absl::Status ToStatus(const Nccl& nccl, Result result, absl::string_view what, Communicator communicator) {
  if (result == kSuccess) return absl::OkStatus();
  std::string message = absl::StrCat("NCCL: ", what, ": ", nccl.get_error_string(result));
  const char* const detail = nccl.get_last_error(communicator);
  if (detail != nullptr && *detail != '\0') absl::StrAppend(&message, " (", detail, ")");
  const bool elsewhere = result == kRemoteError || result == kSystemError;
  return elsewhere ? absl::UnavailableError(message) : absl::InternalError(message);
}

}  // namespace rwkv::worker::nccl
