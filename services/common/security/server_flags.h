// The flags that every serving process has beside its own: TLS and health.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "services/common/security/security.h"

namespace rwkv::common {

// --tls_certificate, --tls_key, --tls_authorities, of a process that is a `role`. The router adds --api_keys.
Security::Options SecurityOptionsFromFlags(Role role);

// --health_listen
std::string HealthAddressFromFlags();

// What serving will want of these, before anything large is opened; --health_listen too. kInvalidArgument names the
// flag.
absl::Status CheckServerFlags(const std::string& listen, const std::string& metrics_listen,
                              absl::Duration drain_timeout);

}  // namespace rwkv::common
