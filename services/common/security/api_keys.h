// The API keys that clients show, from a file that is read again when it changes. The file holds no key, only hashes;
// a line is a key:
//
//   # made by: key=$(openssl rand -hex 32); printf %s "$key" | sha256sum
//   sha256:0f1e...64 hex digits name=alice role=client tenant=acme
//
// `name` (for logs) is required and unique; `role` is client unless it says gateway or operator; `tenant` says whose
// sessions the caller sees and whose limits it has (services/router/tenants). Anything else is an error, so that a
// misspelt word is never silently none.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "services/common/metrics.h"
#include "services/common/reloaded_file.h"
#include "services/common/security/access.h"

namespace rwkv::common {

struct ApiKey {
  std::string sha256;  // 32 bytes.
  std::string name;
  Role role = Role::kClient;
  std::string tenant;
};

// kInvalidArgument names the line, never its hash.
absl::StatusOr<std::vector<ApiKey>> ParseApiKeys(absl::string_view text);

// Thread-safe.
class ApiKeys {
 public:
  struct Who {
    std::string name;
    Role role = Role::kClient;
    std::string tenant;
  };

  // The file is looked at again at most every `reload_interval`, by whoever asks. `metrics` as in ReloadedFile.
  static absl::StatusOr<std::unique_ptr<ApiKeys>> Open(const std::string& path, absl::Duration reload_interval,
                                                       Metrics* metrics);

  // Whose key this is. Takes the same time for every key of the file and for none of them. A file that has become
  // unreadable or wrong is reported in the log and the keys of before stay; an empty one takes all away.
  absl::optional<Who> Find(absl::string_view key) ABSL_LOCKS_EXCLUDED(mu_);

  // Looks at the file, so that what is wrong with it is known before somebody calls.
  void Look() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  ApiKeys() = default;

  absl::Mutex mu_;
  std::unique_ptr<ReloadedFile> file_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const std::vector<ApiKey>> keys_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::common
