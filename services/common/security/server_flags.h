// The flags that every serving process has beside its own: TLS and health.
#pragma once

#include <string>

#include "services/common/security/security.h"

namespace rwkv::common {

// --tls_certificate, --tls_key, --tls_authorities. The router adds --api_keys.
Security::Options SecurityOptionsFromFlags();

// --health_listen
std::string HealthAddressFromFlags();

}  // namespace rwkv::common
