#include "tests/testing/certificates.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace rwkv::testing {
namespace {

struct Free {
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(X509* certificate) const { X509_free(certificate); }
};
using Key = std::unique_ptr<EVP_PKEY, Free>;
using Certificate = std::unique_ptr<X509, Free>;

// A test cannot go on without.
void Must(bool done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "OpenSSL cannot %s\n", what);
  std::abort();
}

Key MakeKey() {
  Key key(EVP_EC_gen("P-256"));
  Must(key != nullptr, "make a key");
  return key;
}

void AddExtension(X509* certificate, X509* issuer, int id, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, id, value.c_str());
  Must(extension != nullptr && X509_add_ext(certificate, extension, -1) == 1, "add an extension");
  X509_EXTENSION_free(extension);
}

// Signed by the issuer, or by itself without one.
Certificate MakeCertificate(const std::string& name, EVP_PKEY* key, X509* issuer, EVP_PKEY* issuer_key,
                            const TestAuthority::Subject& subject, bool is_authority) {
  Certificate certificate(X509_new());
  X509* x = certificate.get();
  uint32_t serial = 0;
  Must(RAND_bytes(reinterpret_cast<unsigned char*>(&serial), sizeof(serial)) == 1, "draw a number");
  X509_set_version(x, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(x), serial >> 1);
  X509_gmtime_adj(X509_getm_notBefore(x), static_cast<long>(absl::ToInt64Seconds(subject.starts_in)));
  X509_gmtime_adj(X509_getm_notAfter(x), static_cast<long>(absl::ToInt64Seconds(subject.ends_in)));
  X509_set_pubkey(x, key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(x), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  if (issuer == nullptr) issuer = x;
  X509_set_issuer_name(x, X509_get_subject_name(issuer));
  AddExtension(x, issuer, NID_basic_constraints, is_authority ? "critical,CA:TRUE" : "critical,CA:FALSE");
  if (is_authority) AddExtension(x, issuer, NID_key_usage, "critical,keyCertSign,cRLSign");
  AddExtension(x, issuer, NID_subject_key_identifier, "hash");
  if (!subject.alternative_names.empty()) {
    AddExtension(x, issuer, NID_subject_alt_name, subject.alternative_names);
  }
  Must(X509_sign(x, issuer_key, EVP_sha256()) > 0, "sign");
  return certificate;
}

template <typename Write>
std::string ToPem(Write write) {
  BIO* bio = BIO_new(BIO_s_mem());
  Must(write(bio) == 1, "write PEM");
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  std::string pem(data, static_cast<size_t>(size));
  BIO_free(bio);
  return pem;
}

}  // namespace

struct TestAuthority::Impl {
  Key key = MakeKey();
  Certificate certificate;
};

TestAuthority::TestAuthority(const std::string& name) : TestAuthority(name, Subject{}) {}

TestAuthority::TestAuthority(const std::string& name, const Subject& subject) : impl_(std::make_unique<Impl>()) {
  impl_->certificate = MakeCertificate(name, impl_->key.get(), nullptr, impl_->key.get(), subject, true);
  certificate_ = ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, impl_->certificate.get()); });
}

TestAuthority::TestAuthority(const std::string& name, const TestAuthority& parent) : impl_(std::make_unique<Impl>()) {
  impl_->certificate =
      MakeCertificate(name, impl_->key.get(), parent.impl_->certificate.get(), parent.impl_->key.get(), {}, true);
  certificate_ = ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, impl_->certificate.get()); });
}

TestAuthority::~TestAuthority() = default;

TestAuthority::Pair TestAuthority::Issue(const Subject& subject) {
  const Key key = MakeKey();
  const Certificate certificate =
      MakeCertificate("test", key.get(), impl_->certificate.get(), impl_->key.get(), subject, false);
  Pair pair;
  pair.certificate = ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, certificate.get()); });
  pair.key =
      ToPem([&](BIO* bio) { return PEM_write_bio_PrivateKey(bio, key.get(), nullptr, nullptr, 0, nullptr, nullptr); });
  return pair;
}

TestAuthority::Pair TestAuthority::IssueRole(const std::string& role) {
  Subject subject;
  subject.alternative_names = absl::StrCat("URI:spiffe://test/rwkv/", role, ",DNS:localhost,IP:127.0.0.1");
  return Issue(subject);
}

TlsFolder::TlsFolder(const std::string& directory) : directory_(directory) { mkdir(directory.c_str(), 0700); }

void TlsFolder::Write(const TestAuthority::Pair& pair) {
  ReplaceFile(key(), pair.key);
  ReplaceFile(certificate(), pair.certificate);
}

void TlsFolder::WriteAuthorities(const std::string& pem) { ReplaceFile(authorities(), pem); }

void ReplaceFile(const std::string& path, const std::string& content) {
  const std::string beside = path + ".new";
  std::ofstream(beside, std::ios::binary | std::ios::trunc) << content;
  Must(std::rename(beside.c_str(), path.c_str()) == 0, "replace a file");
}

}  // namespace rwkv::testing
