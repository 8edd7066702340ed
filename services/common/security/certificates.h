// What is in PEM files, as far as a process should know before gRPC uses them, and an operator afterwards. All of it
// takes the text of files and is pure.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "services/common/security/access.h"

namespace rwkv::common {

struct CertificateInfo {
  absl::Time not_before;
  absl::Time not_after;
  RoleSet roles;
};

// The whole file. kInvalidArgument: larger than files of certificates are. Other codes: it cannot be read. All name
// the file.
absl::StatusOr<std::string> ReadPemFile(const std::string& path);

// The first certificate, which is the process's own. kInvalidArgument: there is none, or what follows is cut off.
absl::StatusOr<CertificateInfo> ParseCertificate(absl::string_view pem);

// The first to expire of the authorities. kInvalidArgument: there is none, one is cut off, or none is valid at `now`.
absl::StatusOr<CertificateInfo> ParseAuthorities(absl::string_view pem, absl::Time now);

// kInvalidArgument: not valid at `now`.
absl::Status CheckValidAt(const CertificateInfo& info, absl::Time now);

// kInvalidArgument: `key` is no private key without a passphrase, or not that of the first of `certificate`.
absl::Status CheckKeyOfCertificate(absl::string_view key, absl::string_view certificate);

// kInvalidArgument: no chain leads from the first of `certificate`, by those behind it, to one of `authorities`. When
// any of them expires is not looked at.
absl::Status CheckSignedBy(absl::string_view certificate, absl::string_view authorities);

}  // namespace rwkv::common
