// Servers that tests of shared stores start for themselves: a PostgreSQL of Debian's package, and an S3 (s3_server.py).
// Each is a process on a free port with a folder of its own; a test may kill, freeze and restart it.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace rwkv::testing {

// Use it from one thread, which must outlive it: when that thread ends the kernel kills the process.
class TestServer {
 public:
  virtual ~TestServer() = default;
  TestServer(const TestServer&) = delete;
  TestServer& operator=(const TestServer&) = delete;

  // SIGKILL, and waits until it is gone.
  void Kill();
  // Starts it again over the same data, on the same port, and waits until it answers.
  absl::Status Restart();
  // SIGSTOP and SIGCONT: alive, but silent.
  void Freeze();
  void Thaw();

 protected:
  TestServer() = default;
  void Spawn(const std::vector<std::string>& command);
  // Starts the process, waits until it listens on port_, and then for what else it needs.
  virtual absl::Status Start() = 0;
  absl::Status WaitUntilListening() const;
  std::string LogTail() const;

  std::string folder_;
  int port_ = 0;
  pid_t pid_ = -1;
};

class PostgresServer final : public TestServer {
 public:
  static absl::StatusOr<std::unique_ptr<PostgresServer>> Launch();
  ~PostgresServer() override;
  // Without password; the password is in password_file().
  std::string url() const;
  std::string password() const { return "secret"; }
  std::string password_file() const { return folder_ + "/password"; }

 private:
  PostgresServer() = default;
  absl::Status Start() override;
};

class S3Server final : public TestServer {
 public:
  static constexpr char kAccessKey[] = "test-access";
  static constexpr char kSecretKey[] = "test-secret";
  static constexpr char kBucket[] = "states";

  static absl::StatusOr<std::unique_ptr<S3Server>> Launch();
  ~S3Server() override;
  std::string endpoint() const;
  // As --s3_credentials_file wants it.
  std::string credentials_file() const { return folder_ + "/credentials"; }
  // Where the objects of the bucket lie, for tests that damage them.
  std::string bucket_folder() const { return folder_ + "/data/" + kBucket; }

 private:
  S3Server() = default;
  absl::Status Start() override;
};

}  // namespace rwkv::testing
