#include "services/common/security/security.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/security/auth_context.h"
#include "grpcpp/security/auth_metadata_processor.h"
#include "grpcpp/security/tls_certificate_verifier.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "kernels/base/status_macros.h"
#include "prometheus/collectable.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/security/certificates.h"

namespace rwkv::common {
namespace {

using ::grpc::experimental::CertificateVerifier;
using ::grpc::experimental::ExternalCertificateVerifier;
using ::grpc::experimental::FileWatcherCertificateProvider;
using ::grpc::experimental::TlsChannelCredentialsOptions;
using ::grpc::experimental::TlsCustomVerificationCheckRequest;
using ::grpc::experimental::TlsServerCredentialsOptions;

constexpr size_t kMaxApiKeyBytes = 1024;

absl::string_view View(grpc::string_ref text) { return absl::string_view(text.data(), text.size()); }

// Lets a server's certificate pass if it has the role. Its host name says nothing: pods come and go.
class RoleVerifier final : public ExternalCertificateVerifier {
 public:
  explicit RoleVerifier(Role role) : role_(role) {}
  ~RoleVerifier() override = default;

  bool Verify(TlsCustomVerificationCheckRequest* request, std::function<void(grpc::Status)> /*callback*/,
              grpc::Status* status) override {
    RoleSet roles;
    for (const grpc::string_ref& uri : request->uri_names()) AddRoleOfUri(View(uri), &roles);
    for (const grpc::string_ref& name : request->dns_names()) AddRoleOfDnsName(View(name), &roles);
    if (!roles.Has(role_)) {
      *status = grpc::Status(
          grpc::StatusCode::UNAUTHENTICATED,
          absl::StrCat("the server's certificate has the role ", roles.ToString(), ", not ", RoleName(role_)));
    }
    return true;
  }
  void Cancel(TlsCustomVerificationCheckRequest* /*request*/) override {}

 private:
  const Role role_;
};

// Asked at every scrape, so that it tells of the files as they are: gRPC does not.
class ExpiryMetric final : public prometheus::Collectable {
 public:
  explicit ExpiryMetric(std::shared_ptr<TlsFiles> files) : files_(std::move(files)) {}

  std::vector<prometheus::MetricFamily> Collect() const override {
    prometheus::MetricFamily expiry = {"rwkv_tls_expiry_timestamp_seconds",
                                       "When the certificate, or the first authority, that is used expires; 0: what "
                                       "the file holds now is of no use, and what it held before is used.",
                                       prometheus::MetricType::Gauge,
                                       {}};
    const auto add = [&expiry](const char* file, const absl::Status& status, const CertificateInfo& used) {
      prometheus::ClientMetric metric;
      metric.label = {{"file", file}};
      metric.gauge.value = status.ok() ? static_cast<double>(absl::ToUnixSeconds(used.not_after)) : 0;
      expiry.metric.push_back(metric);
    };
    const TlsFiles::State state = files_->Look();
    add("certificate", state.own_status, state.own);
    add("authorities", state.authorities_status, state.authorities);
    return {std::move(expiry)};
  }

 private:
  const std::shared_ptr<TlsFiles> files_;
};

}  // namespace

// Runs before every call, on gRPC's threads; asks nobody.
class Security::Processor final : public grpc::AuthMetadataProcessor {
 public:
  Processor(std::shared_ptr<ApiKeys> keys, prometheus::Counter* unauthenticated, prometheus::Counter* denied)
      : keys_(std::move(keys)), unauthenticated_(unauthenticated), denied_(denied) {}

  bool IsBlocking() const override { return false; }

  // `context` is shared by all calls of the connection, so nothing of a call is put into it.
  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext* context, OutputMetadata* /*consumed*/,
                       OutputMetadata* /*response*/) override {
    const auto path = metadata.find(":path");
    const absl::string_view method = path == metadata.end() ? absl::string_view() : View(path->second);
    const absl::StatusOr<Identity> who = Identify(metadata, *context, keys_.get());
    if (!who.ok()) return Refuse(who.status(), method, {}, "");
    const absl::Status status = CheckAccess(who->roles, method);
    return status.ok() ? grpc::Status::OK : Refuse(status, method, who->roles, who->key_name);
  }

 private:
  grpc::Status Refuse(const absl::Status& status, absl::string_view method, RoleSet roles, const std::string& key_name)
      ABSL_LOCKS_EXCLUDED(mu_) {
    (absl::IsUnauthenticated(status) ? unauthenticated_ : denied_)->Increment();
    bool log = false;
    {
      // One line a second: whoever tries keys must not fill the disk too.
      absl::MutexLock lock(&mu_);
      const absl::Time now = absl::Now();
      if (now >= next_line_) {
        next_line_ = now + absl::Seconds(1);
        log = true;
      }
    }
    if (log) {
      LogWarning("call_refused", {{"method", method.substr(0, 200)},
                                  {"roles", roles.ToString()},
                                  {"api_key_of", key_name},
                                  {"why", absl::StatusCodeToString(status.code())}});
    }
    return ToGrpcStatus(status);
  }

  const std::shared_ptr<ApiKeys> keys_;
  prometheus::Counter* const unauthenticated_;
  prometheus::Counter* const denied_;
  absl::Mutex mu_;
  absl::Time next_line_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
};

absl::StatusOr<Identity> Security::Identify(const CallMetadata& metadata, const grpc::AuthContext& context,
                                            ApiKeys* keys) {
  Identity identity;
  if (context.IsPeerAuthenticated()) {
    for (const grpc::string_ref& uri : context.FindPropertyValues(GRPC_PEER_URI_PROPERTY_NAME)) {
      AddRoleOfUri(View(uri), &identity.roles);
      std::string tenant = TenantOfUri(View(uri));
      if (tenant.empty()) continue;
      if (!identity.tenant.empty() && identity.tenant != tenant) {
        return absl::UnauthenticatedError("the certificate names two tenants");
      }
      identity.tenant = std::move(tenant);
    }
    for (const grpc::string_ref& name : context.FindPropertyValues(GRPC_PEER_DNS_PROPERTY_NAME)) {
      AddRoleOfDnsName(View(name), &identity.roles);
    }
  }
  const auto authorization = metadata.find("authorization");
  if (keys == nullptr || authorization == metadata.end()) return identity;
  absl::string_view value = View(authorization->second);
  constexpr absl::string_view kScheme = "bearer ";
  absl::optional<ApiKeys::Who> who;
  if (absl::StartsWithIgnoreCase(value, kScheme)) who = keys->Find(value.substr(kScheme.size()));
  // Not "else as the certificate says": who shows a key means to be who it says.
  if (!who.has_value()) return absl::UnauthenticatedError("the API key is not known");
  identity.roles.Add(who->role);
  identity.key_name = who->name;
  identity.tenant = who->tenant;
  return identity;
}

absl::StatusOr<Identity> Security::Identify(const grpc::ServerContextBase& context) const {
  if (!enabled()) return Identity{};
  const std::shared_ptr<const grpc::AuthContext> peer = context.auth_context();
  return Identify(context.client_metadata(), *peer, keys_.get());
}

Security::Security(Metrics* metrics)
    : unauthenticated_(&metrics->Counter("rwkv_server_refused_calls_total",
                                         "Calls refused at the door: without a known identity, or without the right.",
                                         {{"cause", "unauthenticated"}})),
      denied_(&metrics->Counter("rwkv_server_refused_calls_total",
                                "Calls refused at the door: without a known identity, or without the right.",
                                {{"cause", "denied"}})) {}

absl::StatusOr<std::unique_ptr<Security>> Security::Create(const Options& options, Metrics* metrics) {
  std::unique_ptr<Security> security(new Security(metrics));
  const int named = !options.certificate.empty() + !options.key.empty() + !options.authorities.empty();
  if (named == 0 && options.api_keys.empty()) return security;
  if (named != 3) {
    return absl::InvalidArgumentError(
        options.api_keys.empty() ? "TLS wants a certificate, its key and the authorities: all three or none"
                                 : "API keys want TLS, a certificate, its key and the authorities: they would be read "
                                   "on the way");
  }
  TlsFiles::Options files;
  files.certificate = options.certificate;
  files.key = options.key;
  files.authorities = options.authorities;
  files.role = options.role;
  files.reload_interval = options.reload_interval;
  RWKV_ASSIGN_OR_RETURN(security->files_, TlsFiles::Open(files));
  if (!options.api_keys.empty()) {
    RWKV_ASSIGN_OR_RETURN(security->keys_, ApiKeys::Open(options.api_keys, options.reload_interval, metrics));
  }
  metrics->Add(std::make_shared<ExpiryMetric>(security->files_));
  const CertificateInfo own = security->files_->Look().own;
  LogInfo("tls", {{"roles", own.roles.ToString()},
                  {"expires", absl::FormatTime(own.not_after, absl::UTCTimeZone())},
                  {"api_keys", !options.api_keys.empty()}});
  security->watch_ = std::make_unique<Periodic>(options.reload_interval, [security = security.get()] {
    security->files_->Look();
    if (security->keys_ != nullptr) security->keys_->Look();
  });
  return security;
}

std::shared_ptr<grpc::ChannelCredentials> Security::ForChannelTo(Role role) const {
  if (!enabled()) return nullptr;
  TlsChannelCredentialsOptions options;
  options.set_certificate_provider(files_->provider());
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  options.set_certificate_verifier(ExternalCertificateVerifier::Create<RoleVerifier>(role));
  options.set_check_call_host(false);
  return grpc::experimental::TlsCredentials(options);
}

std::shared_ptr<grpc::ServerCredentials> Security::ForServer() const {
  if (!enabled()) return nullptr;
  TlsServerCredentialsOptions options(files_->provider());
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  options.set_cert_request_type(keys_ == nullptr ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                                 : GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY);
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::experimental::TlsServerCredentials(options);
  credentials->SetAuthMetadataProcessor(std::make_shared<Processor>(keys_, unauthenticated_, denied_));
  return credentials;
}

namespace {

// Adds the API key to every call; gRPC does so over TLS only.
class ApiKeyPlugin final : public grpc::MetadataCredentialsPlugin {
 public:
  explicit ApiKeyPlugin(const std::string& key) : value_(absl::StrCat("Bearer ", key)) {}
  bool IsBlocking() const override { return false; }
  const char* GetType() const override { return "rwkv_api_key"; }
  grpc::Status GetMetadata(grpc::string_ref /*url*/, grpc::string_ref /*method*/, const grpc::AuthContext& /*context*/,
                           std::multimap<std::string, std::string>* metadata) override {
    metadata->emplace("authorization", value_);
    return grpc::Status::OK;
  }
  std::string DebugString() override { return "rwkv_api_key"; }

 private:
  const std::string value_;
};

absl::StatusOr<std::string> ReadApiKey(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string key(kMaxApiKeyBytes + 1, '\0');
  file.read(key.data(), static_cast<std::streamsize>(key.size()));
  if (!file.is_open()) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  key.resize(static_cast<size_t>(file.gcount()));
  absl::StripAsciiWhitespace(&key);
  const bool printable = std::all_of(key.begin(), key.end(), [](char c) { return absl::ascii_isgraph(c); });
  if (key.empty() || key.size() > kMaxApiKeyBytes - 1 || !printable) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": wants one API key, printable and without blanks"));
  }
  return key;
}

}  // namespace

absl::StatusOr<ClientCredentials> MakeClientCredentials(const ClientSecurityOptions& options) {
  if (options.authorities.empty()) return absl::InvalidArgumentError("TLS wants the authorities that are believed");
  if (options.certificate.empty() != options.key.empty()) {
    return absl::InvalidArgumentError("a certificate and its key: one without the other");
  }
  RWKV_ASSIGN_OR_RETURN(const std::string authorities, ReadPemFile(options.authorities));
  RWKV_RETURN_IF_ERROR(Annotate(ParseAuthorities(authorities, absl::Now()).status(), options.authorities));
  if (!options.key.empty()) {
    RWKV_ASSIGN_OR_RETURN(const std::string certificate, ReadPemFile(options.certificate));
    RWKV_ASSIGN_OR_RETURN(const std::string key, ReadPemFile(options.key));
    const absl::StatusOr<CertificateInfo> own = ParseCertificate(certificate);
    RWKV_RETURN_IF_ERROR(Annotate(own.status(), options.certificate));
    RWKV_RETURN_IF_ERROR(Annotate(CheckValidAt(*own, absl::Now()), options.certificate));
    RWKV_RETURN_IF_ERROR(Annotate(CheckKeyOfCertificate(key, certificate), options.key));
  }
  TlsChannelCredentialsOptions tls;
  tls.set_certificate_provider(
      std::make_shared<FileWatcherCertificateProvider>(options.key, options.certificate, options.authorities, 60));
  tls.watch_root_certs();
  if (!options.key.empty()) tls.watch_identity_key_cert_pairs();
  ClientCredentials client;
  client.server_name = options.server_name;
  client.credentials = grpc::experimental::TlsCredentials(tls);  // Checks the host name.
  if (!options.api_key_file.empty()) {
    RWKV_ASSIGN_OR_RETURN(const std::string key, ReadApiKey(options.api_key_file));
    client.credentials = grpc::CompositeChannelCredentials(
        client.credentials, grpc::MetadataCredentialsFromPlugin(std::make_unique<ApiKeyPlugin>(key)));
  }
  return client;
}

}  // namespace rwkv::common
