#include "services/common/security/certificates.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/civil_time.h"
#include "kernels/base/status_macros.h"

namespace rwkv::common {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

struct Free {
  void operator()(std::FILE* file) const { std::fclose(file); }
  void operator()(BIO* bio) const { BIO_free(bio); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(GENERAL_NAMES* names) const { GENERAL_NAMES_free(names); }
  void operator()(X509_STORE* store) const { X509_STORE_free(store); }
  void operator()(X509_STORE_CTX* context) const { X509_STORE_CTX_free(context); }
  void operator()(STACK_OF(X509) * stack) const { sk_X509_free(stack); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

// Asked for a passphrase: a process has nobody to ask.
int NoPassphrase(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*data*/) { return 0; }

Owned<BIO> Open(absl::string_view pem) { return Owned<BIO>(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()))); }

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

// All certificates of the text, one at least.
absl::StatusOr<std::vector<Owned<X509>>> Parse(absl::string_view pem) {
  const Owned<BIO> bio = Open(pem);
  std::vector<Owned<X509>> certificates;
  while (X509* certificate = PEM_read_bio_X509(bio.get(), nullptr, NoPassphrase, nullptr)) {
    certificates.emplace_back(certificate);
  }
  const bool at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (!at_end) {
    return absl::InvalidArgumentError(
        absl::StrCat("certificate ", certificates.size() + 1, " of it is cut off or broken"));
  }
  if (certificates.empty()) return absl::InvalidArgumentError("no certificate in PEM");
  return certificates;
}

}  // namespace

absl::StatusOr<std::string> ReadPemFile(const std::string& path) {
  const Owned<std::FILE> file(std::fopen(path.c_str(), "re"));
  if (file == nullptr) return absl::ErrnoToStatus(errno, path);
  std::string text(kMaxFileBytes + 1, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  if (std::ferror(file.get()) != 0) return absl::UnavailableError(absl::StrCat(path, ": cannot be read"));
  if (text.size() <= kMaxFileBytes) return text;
  return absl::InvalidArgumentError(absl::StrCat(path, ": larger than ", kMaxFileBytes, " bytes"));
}

absl::StatusOr<CertificateInfo> ParseCertificate(absl::string_view pem) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<Owned<X509>> certificates, Parse(pem));
  return Describe(certificates.front().get());
}

absl::StatusOr<CertificateInfo> ParseAuthorities(absl::string_view pem, absl::Time now) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<Owned<X509>> certificates, Parse(pem));
  CertificateInfo first = Describe(certificates.front().get());
  absl::Status valid = CheckValidAt(first, now);
  for (const Owned<X509>& certificate : certificates) {
    const CertificateInfo info = Describe(certificate.get());
    if (info.not_after < first.not_after) first = info;
    if (CheckValidAt(info, now).ok()) valid = absl::OkStatus();
  }
  if (!valid.ok()) return valid;
  return first;
}

absl::Status CheckValidAt(const CertificateInfo& info, absl::Time now) {
  if (now >= info.not_before && now <= info.not_after) return absl::OkStatus();
  const auto in_utc = [](absl::Time time) { return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", time, absl::UTCTimeZone()); };
  return absl::InvalidArgumentError(
      absl::StrCat("valid from ", in_utc(info.not_before), " to ", in_utc(info.not_after), ", not now"));
}

absl::Status CheckKeyOfCertificate(absl::string_view key, absl::string_view certificate) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<Owned<X509>> certificates, Parse(certificate));
  const Owned<EVP_PKEY> private_key(PEM_read_bio_PrivateKey(Open(key).get(), nullptr, NoPassphrase, nullptr));
  const bool fits =
      private_key != nullptr && X509_check_private_key(certificates.front().get(), private_key.get()) == 1;
  ERR_clear_error();
  if (private_key == nullptr) return absl::InvalidArgumentError("no private key in PEM without a passphrase");
  if (!fits) return absl::InvalidArgumentError("it is not the key of the certificate");
  return absl::OkStatus();
}

absl::Status CheckSignedBy(absl::string_view certificate, absl::string_view authorities) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<Owned<X509>> chain, Parse(certificate));
  RWKV_ASSIGN_OR_RETURN(const std::vector<Owned<X509>> believed, Parse(authorities));
  const Owned<X509_STORE> store(X509_STORE_new());
  for (const Owned<X509>& authority : believed) X509_STORE_add_cert(store.get(), authority.get());
  const Owned<STACK_OF(X509)> between(sk_X509_new_null());
  for (size_t i = 1; i < chain.size(); ++i) sk_X509_push(between.get(), chain[i].get());
  const Owned<X509_STORE_CTX> context(X509_STORE_CTX_new());
  X509_STORE_CTX_init(context.get(), store.get(), chain.front().get(), between.get());
  X509_VERIFY_PARAM_set_flags(X509_STORE_CTX_get0_param(context.get()), X509_V_FLAG_NO_CHECK_TIME);
  const bool leads_there = X509_verify_cert(context.get()) == 1;
  const char* const why = X509_verify_cert_error_string(X509_STORE_CTX_get_error(context.get()));
  ERR_clear_error();
  if (leads_there) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("not signed by any of the authorities: ", why));
}

}  // namespace rwkv::common
