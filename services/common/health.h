// Asking a process for its health (grpc.health.v1.Health/Check).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"

namespace rwkv::common {

// True: SERVING. False: it answers, but with any other state. kNotFound: it does not know `service` (empty: the whole
// process). Other errors: it cannot be reached before the deadline. Blocks.
absl::StatusOr<bool> CheckHealth(const std::shared_ptr<grpc::Channel>& channel, absl::Time deadline,
                                 const std::string& service = "");

}  // namespace rwkv::common
