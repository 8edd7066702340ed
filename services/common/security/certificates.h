// What is in PEM files, as far as a process should know before gRPC uses them, and an operator afterwards.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/common/security/access.h"

namespace rwkv::common {

struct CertificateInfo {
  absl::Time not_before;
  absl::Time not_after;
  RoleSet roles;
};

// The first certificate of the file, which is the process's own. kInvalidArgument: there is none.
absl::StatusOr<CertificateInfo> ReadCertificate(const std::string& path);

// The first to expire of the authorities in the file. kInvalidArgument: there is none.
absl::StatusOr<CertificateInfo> ReadAuthorities(const std::string& path);

// kInvalidArgument: `key` is no private key without a passphrase, or not that of `certificate`.
absl::Status CheckKeyOfCertificate(const std::string& key, const std::string& certificate);

}  // namespace rwkv::common
