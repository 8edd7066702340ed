#include "services/common/security/certificates.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/civil_time.h"
#include "kernels/base/status_macros.h"

namespace rwkv::common {
namespace {

struct Free {
  void operator()(std::FILE* file) const { std::fclose(file); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(GENERAL_NAMES* names) const { GENERAL_NAMES_free(names); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

// Asked for a passphrase: a process has nobody to ask.
int NoPassphrase(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*data*/) { return 0; }

absl::StatusOr<Owned<std::FILE>> Open(const std::string& path) {
  Owned<std::FILE> file(std::fopen(path.c_str(), "re"));
  if (file == nullptr) return absl::ErrnoToStatus(errno, path);
  return file;
}

// Null at the end of the file, and where it is none.
Owned<X509> Next(std::FILE* file) {
  Owned<X509> certificate(PEM_read_X509(file, nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  return certificate;
}

absl::Time ToTime(const ASN1_TIME* time) {
  std::tm utc = {};
  if (ASN1_TIME_to_tm(time, &utc) != 1) return absl::InfinitePast();
  return absl::FromCivil(
      absl::CivilSecond(utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec),
      absl::UTCTimeZone());
}

CertificateInfo Describe(const X509* certificate) {
  CertificateInfo info;
  info.not_before = ToTime(X509_get0_notBefore(certificate));
  info.not_after = ToTime(X509_get0_notAfter(certificate));
  const Owned<GENERAL_NAMES> names(
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)));
  for (int i = 0; names != nullptr && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type != GEN_URI && name->type != GEN_DNS) continue;
    const ASN1_IA5STRING* text = name->type == GEN_URI ? name->d.uniformResourceIdentifier : name->d.dNSName;
    const absl::string_view view(reinterpret_cast<const char*>(ASN1_STRING_get0_data(text)), ASN1_STRING_length(text));
    name->type == GEN_URI ? AddRoleOfUri(view, &info.roles) : AddRoleOfDnsName(view, &info.roles);
  }
  return info;
}

}  // namespace

absl::StatusOr<CertificateInfo> ReadCertificate(const std::string& path) {
  RWKV_ASSIGN_OR_RETURN(const Owned<std::FILE> file, Open(path));
  const Owned<X509> certificate = Next(file.get());
  if (certificate == nullptr) return absl::InvalidArgumentError(absl::StrCat(path, ": no certificate in PEM"));
  return Describe(certificate.get());
}

absl::StatusOr<CertificateInfo> ReadAuthorities(const std::string& path) {
  RWKV_ASSIGN_OR_RETURN(CertificateInfo first, ReadCertificate(path));
  RWKV_ASSIGN_OR_RETURN(const Owned<std::FILE> file, Open(path));
  while (const Owned<X509> certificate = Next(file.get())) {
    const CertificateInfo info = Describe(certificate.get());
    if (info.not_after < first.not_after) first = info;
  }
  return first;
}

absl::Status CheckKeyOfCertificate(const std::string& key, const std::string& certificate) {
  RWKV_ASSIGN_OR_RETURN(const Owned<std::FILE> key_file, Open(key));
  RWKV_ASSIGN_OR_RETURN(const Owned<std::FILE> certificate_file, Open(certificate));
  const Owned<X509> read = Next(certificate_file.get());
  if (read == nullptr) return absl::InvalidArgumentError(absl::StrCat(certificate, ": no certificate in PEM"));
  const Owned<EVP_PKEY> private_key(PEM_read_PrivateKey(key_file.get(), nullptr, NoPassphrase, nullptr));
  const bool fits = private_key != nullptr && X509_check_private_key(read.get(), private_key.get()) == 1;
  ERR_clear_error();
  if (private_key == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(key, ": no private key in PEM without a passphrase"));
  }
  if (!fits) return absl::InvalidArgumentError(absl::StrCat(key, " is not the key of ", certificate));
  return absl::OkStatus();
}

}  // namespace rwkv::common
