#include "services/common/security/server_flags.h"

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"
#include "services/common/grpc_status.h"

// main_loop.cc shows the flags of this file in --help too.
ABSL_FLAG(std::string, tls_certificate, "",
          "PEM: this process's certificate, which says its role, then what signed it. With --tls_key and "
          "--tls_authorities; without all three nothing is encrypted. The files are read again when they change.");
ABSL_FLAG(std::string, tls_key, "", "PEM: the private key of --tls_certificate, without a passphrase.");
ABSL_FLAG(std::string, tls_authorities, "",
          "PEM: authorities whose certificates are believed, of clients and servers.");
ABSL_FLAG(std::string, health_listen, "",
          "HOST:PORT that answers grpc.health.v1.Health alone, never encrypted, for probes; empty: none. The service "
          "\"live\" is serving as long as the process runs, \"\" while it takes work.");

namespace rwkv::common {

Security::Options SecurityOptionsFromFlags(Role role) {
  Security::Options options;
  options.role = role;
  options.certificate = absl::GetFlag(FLAGS_tls_certificate);
  options.key = absl::GetFlag(FLAGS_tls_key);
  options.authorities = absl::GetFlag(FLAGS_tls_authorities);
  return options;
}

std::string HealthAddressFromFlags() { return absl::GetFlag(FLAGS_health_listen); }

absl::Status CheckServerFlags(const std::string& listen, const std::string& metrics_listen,
                              absl::Duration drain_timeout) {
  RWKV_RETURN_IF_ERROR(Annotate(ParseHostPort(listen).status(), "--listen"));
  if (!metrics_listen.empty()) {
    RWKV_RETURN_IF_ERROR(Annotate(ParseHostPort(metrics_listen).status(), "--metrics_listen"));
  }
  if (const std::string health = HealthAddressFromFlags(); !health.empty()) {
    RWKV_RETURN_IF_ERROR(Annotate(ParseHostPort(health).status(), "--health_listen"));
  }
  if (drain_timeout >= absl::ZeroDuration()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--drain_timeout: ", absl::FormatDuration(drain_timeout), " is negative"));
}

}  // namespace rwkv::common
