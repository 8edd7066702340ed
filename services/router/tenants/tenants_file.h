// What the tenants of a cluster may have, from a file; a line is a tenant:
//
//   name=acme weight=2 requests_per_minute=600 tokens_per_minute=100000 concurrent_turns=8 stored_bytes=20GiB
//       max_tokens=4096 models=rwkv7-g1-1.5b,rwkv7-g1-0.4b          (of one line)
//
// Only `name` is required. `weight` is its share beside other tenants where tokens are short (default 1); of the others
// 0, or none said, is no bound. Who is of a tenant: `tenant=` of an API key (services/common/security/api_keys.h), or the
// end of a certificate's URI. Anything else in the file is an error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::router {

struct TenantLimits {
  std::string name;
  double weight = 1;                // In (0, 1000].
  int64_t requests_per_minute = 0;  // Calls of Generation that feed the model.
  int64_t tokens_per_minute = 0;    // Fed and drawn.
  int64_t concurrent_turns = 0;     // Of such calls, running or waiting.
  int64_t stored_bytes = 0;         // As rwkv.v1.GetUsageResponse counts them.
  int64_t max_tokens = 0;           // Of one answer.
  std::vector<std::string> models;  // Names or fingerprints; none: all.
};

inline constexpr int kMaxTenants = 10000;

// kInvalidArgument names the line, the tenant, the field and its value.
absl::StatusOr<std::vector<TenantLimits>> ParseTenants(absl::string_view text);

}  // namespace rwkv::router
