// The files of a process's certificate, of its key and of the authorities that it believes, for gRPC.
//
//   files ──looked at again and again──► right, and right together? ──► two files in memory ──► gRPC's file watcher
//
// gRPC's watcher alone takes files as they are. A key beside a certificate that it does not belong to, half of a file,
// an expired one, that of another role: no connection would open any more. So gRPC watches what the files held when
// they were last of use, and what they hold otherwise is said in the log, once, and in the metric, as long as it lasts.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "services/common/security/access.h"
#include "services/common/security/certificates.h"

namespace rwkv::common {

// Thread-safe. Two descriptors of it are never closed: gRPC reads what is behind them for as long as it has a channel
// or server of the provider, which may outlive this.
class TlsFiles {
 public:
  struct Options {
    std::string certificate;                            // PEM: the process's own, then what signed it.
    std::string key;                                    // PEM.
    std::string authorities;                            // PEM: whose certificates are believed, its own among them.
    absl::optional<Role> role;                          // That `certificate` must say; unset: any.
    absl::Duration reload_interval = absl::Seconds(1);  // Of gRPC's watcher. Whole seconds.
  };

  // What is used, and what is wrong with the files as they are now.
  struct State {
    CertificateInfo own;
    CertificateInfo authorities;  // The first to expire.
    absl::Status own_status;      // OK, or why they are not used: certificate and key.
    absl::Status authorities_status;
  };

  // kInvalidArgument: a file does not hold what it should, the key is not the certificate's, the certificate is not
  // valid now, says another role or is not signed by one of the authorities. Other codes: a file cannot be read. All
  // name the file.
  static absl::StatusOr<std::unique_ptr<TlsFiles>> Open(const Options& options);

  // Looks at the files, and takes over what is new and right. To be called again and again.
  State Look() ABSL_LOCKS_EXCLUDED(mu_);

  const std::shared_ptr<grpc::experimental::FileWatcherCertificateProvider>& provider() const { return provider_; }

 private:
  struct Texts {
    std::string certificate, key, authorities;
    bool operator==(const Texts& other) const {
      return certificate == other.certificate && key == other.key && authorities == other.authorities;
    }
  };
  // A file in memory that gRPC reads by its path.
  class Published {
   public:
    absl::Status Replace(const std::string& text);
    std::string path() const;

   private:
    int descriptor_ = -1;
    int version_ = 0;
  };

  explicit TlsFiles(const Options& options) : options_(options) {}
  absl::StatusOr<Texts> Read() const;
  // Fills in what is known of `texts`, right or wrong.
  void Check(const Texts& texts, State* state) const;
  absl::Status Publish(const Texts& texts) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Says it in the log when it is there for the second time: two files are not replaced at once.
  void SayWhy(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  std::shared_ptr<grpc::experimental::FileWatcherCertificateProvider> provider_;
  absl::Mutex mu_;
  Texts used_ ABSL_GUARDED_BY(mu_);
  State state_ ABSL_GUARDED_BY(mu_);
  std::string wrong_ ABSL_GUARDED_BY(mu_);  // What was found last; empty: nothing.
  int times_ ABSL_GUARDED_BY(mu_) = 0;      // How often.
  Published identity_ ABSL_GUARDED_BY(mu_);
  Published authorities_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::common
