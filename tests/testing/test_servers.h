// Servers that tests of shared stores start for themselves: a PostgreSQL of Debian's package, and an S3
// (s3_server.py, or a real one where RWKV_SHARED names a folder with tools/s3-server that is installed).
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
  virtual void Kill();
  // Starts it again over the same data, on the same port, and waits until it answers.
  virtual absl::Status Restart();
  // SIGSTOP and SIGCONT: alive, but silent.
  virtual void Freeze();
  virtual void Thaw();

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
  // SIGINT (a fast shutdown: connections are ended) or SIGQUIT (an immediate one: as a crash); waits until it is gone.
  void Shutdown(int signal);

 private:
  PostgresServer() = default;
  absl::Status Start() override;
};

// What a store is told of an S3.
class AnyS3Server : public TestServer {
 public:
  virtual std::string endpoint() const = 0;
  virtual std::string bucket() const = 0;
  // As --s3_credentials_file wants it.
  virtual std::string credentials_file() const = 0;
};

// The real one if there is one, else s3_server.py.
absl::StatusOr<std::unique_ptr<AnyS3Server>> LaunchS3();

class S3Server final : public AnyS3Server {
 public:
  static constexpr char kAccessKey[] = "test-access";
  static constexpr char kSecretKey[] = "test-secret";
  static constexpr char kBucket[] = "states";

  static absl::StatusOr<std::unique_ptr<S3Server>> Launch();
  ~S3Server() override;
  std::string endpoint() const override;
  std::string bucket() const override { return kBucket; }
  std::string credentials_file() const override { return folder_ + "/credentials"; }
  // Where the objects of the bucket lie, for tests that damage them.
  std::string bucket_folder() const { return folder_ + "/data/" + kBucket; }

 private:
  S3Server() = default;
  absl::Status Start() override;
};

}  // namespace rwkv::testing
