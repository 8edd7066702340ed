// TLS between our processes and for clients: credentials for channels and servers, made of files that are read again
// when they change. Open connections stay, new ones show and want what the files hold by then; files that are of no use
// change nothing (tls_files.h).
//
// A process shows one certificate, to those who call it and to those it calls. Who is called must show the role that
// the caller expects, under whatever name it was found. Who calls is let through by access.h, call by call.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "grpcpp/security/auth_context.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_context.h"
#include "services/common/metrics.h"
#include "services/common/periodic.h"
#include "services/common/security/access.h"
#include "services/common/security/api_keys.h"
#include "services/common/security/tls_files.h"

namespace rwkv::common {

// Who calls, as certificate and API key say.
struct Identity {
  RoleSet roles;
  std::string key_name;  // Of the API key; empty: none was shown.
  std::string tenant;    // The key's, else the certificate's; empty: none.
};

// Thread-safe.
class Security {
 public:
  struct Options {
    std::string certificate;    // PEM: the process's own, then what signed it. With `key` and `authorities`, or none.
    std::string key;            // PEM.
    std::string authorities;    // PEM: whose certificates are believed. Two while one takes over from the other.
    absl::optional<Role> role;  // That `certificate` must say: with another, nobody would talk to the process.
    std::string api_keys;       // api_keys.h. Then a caller may come without a certificate. Empty: none may.
    absl::Duration reload_interval = absl::Seconds(1);  // Whole seconds.
  };

  // Without files everything it gives is null, which stands for no encryption. `metrics` outlives it.
  // kInvalidArgument: only some of the files are named, or as TlsFiles::Open() and ApiKeys::Open() say. Other codes: a
  // file cannot be read.
  static absl::StatusOr<std::unique_ptr<Security>> Create(const Options& options, Metrics* metrics);

  bool enabled() const { return files_ != nullptr; }

  // For a channel to a process of ours that must show the role.
  std::shared_ptr<grpc::ChannelCredentials> ForChannelTo(Role role) const;
  // Certificates are wanted of everybody, or, with API keys, asked for.
  std::shared_ptr<grpc::ServerCredentials> ForServer() const;

  // Of a call that ForServer() has let in. Without TLS everybody is the same, of no tenant. kUnauthenticated: the key
  // was taken out of the file a moment ago.
  absl::StatusOr<Identity> Identify(const grpc::ServerContextBase& context) const;

 private:
  class Processor;
  using CallMetadata = std::multimap<grpc::string_ref, grpc::string_ref>;

  // `keys` may be null.
  static absl::StatusOr<Identity> Identify(const CallMetadata& metadata, const grpc::AuthContext& context,
                                           ApiKeys* keys);

  explicit Security(Metrics* metrics);

  std::shared_ptr<TlsFiles> files_;  // Null: no TLS.
  std::shared_ptr<ApiKeys> keys_;    // Null: none.
  prometheus::Counter* const unauthenticated_;
  prometheus::Counter* const denied_;
  std::unique_ptr<Periodic> watch_;  // Of the files. Last: it uses the rest.
};

// What a client shows from outside the cluster.
struct ClientSecurityOptions {
  std::string authorities;       // PEM, required: whose certificates are believed.
  std::string certificate, key;  // PEM; both or neither.
  std::string api_key_file;      // Holds the key alone. Empty: none is sent.
  std::string server_name;       // That the server's certificate must be for; empty: the host of the address.
};

struct ClientCredentials {
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  std::string server_name;
};

// kInvalidArgument: as Security::Create, or an API key file that is empty or holds more than a key.
absl::StatusOr<ClientCredentials> MakeClientCredentials(const ClientSecurityOptions& options);

}  // namespace rwkv::common
