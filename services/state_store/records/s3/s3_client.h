// A bucket of S3: what the record store needs of it, over libcurl, which signs (AWS SigV4).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace rwkv::state_store {

// Thread-safe. Errors name the request and the server's words: kNotFound no such object; kFailedPrecondition it refuses
// us (credentials, bucket); kUnavailable it does not answer, or fails, also after retries; kDataLoss its answer is not
// what was asked for.
class S3Client {
 public:
  struct Options {
    std::string endpoint;  // "https://s3.eu-central-1.amazonaws.com", "http://127.0.0.1:9000"; no path.
    std::string region = "us-east-1";
    std::string bucket;
    std::string access_key;
    std::string secret_key;
    int attempts = 2;  // Of one request. One more hides a connection that broke; callers have retries of their own.
    absl::Duration timeout = absl::Seconds(60);  // Of one attempt that makes progress.
    absl::Duration silence = absl::Seconds(10);  // Without progress.
    absl::Duration connect = absl::Seconds(3);
  };
  struct Object {
    std::string key;
    uint64_t bytes = 0;
    absl::Time modified;
  };

  // kInvalidArgument: an option. Asks nobody.
  static absl::StatusOr<std::unique_ptr<S3Client>> Create(const Options& options);
  ~S3Client();

  // Durable and visible when it returns OK. Retried: the same again changes nothing.
  absl::Status Put(const std::string& key, absl::Span<const char> data);
  // kDataLoss: it has not `bytes` bytes.
  absl::StatusOr<std::string> Get(const std::string& key, uint64_t bytes);
  // Deleting what is not there is fine.
  absl::Status Delete(const std::string& key);
  // Objects whose keys begin with `prefix`, by key, until `visit` returns false. In pages of at most `page`.
  absl::Status List(const std::string& prefix, absl::FunctionRef<bool(const Object&)> visit, int page = 1000);

 private:
  struct Request;
  struct Response;

  explicit S3Client(const Options& options) : options_(options) {}
  absl::StatusOr<Response> Send(const Request& request);
  absl::StatusOr<Response> SendOnce(const Request& request);
  void* TakeHandle() ABSL_LOCKS_EXCLUDED(mu_);
  void ReturnHandle(void* handle) ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  absl::Mutex mu_;
  std::vector<void*> idle_ ABSL_GUARDED_BY(mu_);  // CURL handles with their connections.
};

}  // namespace rwkv::state_store
