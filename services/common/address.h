// "HOST:PORT" as flags and messages write it. IPv6 hosts stand in brackets: "[::1]:4711".
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::common {

struct HostPort {
  std::string host;  // Without brackets; never empty.
  uint16_t port = 0;
};

// kInvalidArgument: no host, no port, or a port that is not a number in 0 .. 65535; the message quotes `address`.
absl::StatusOr<HostPort> ParseHostPort(absl::string_view address);

std::string FormatHostPort(const HostPort& address);

}  // namespace rwkv::common
