// One connection to PostgreSQL, over libpq. Every wait is bounded; a connection that failed once is not used again.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

struct pg_conn;
struct pg_result;

namespace rwkv::state_store {

// Rows of a result, each value as bytes.
using PostgresRows = std::vector<std::vector<std::string>>;

// A statement and its parameters, in binary form.
struct PostgresStatement {
  std::string name;  // Of a prepared one.
  std::vector<std::string> parameters;
};

// For one thread.
class PostgresConnection {
 public:
  struct Prepared {
    const char* name;
    const char* sql;
  };

  // kUnavailable: no server answers there. kFailedPrecondition: it does not let us in. Messages never hold a password.
  static absl::StatusOr<std::unique_ptr<PostgresConnection>> Open(const std::string& url, const std::string& password,
                                                                  absl::Duration timeout);
  ~PostgresConnection();
  PostgresConnection(const PostgresConnection&) = delete;

  absl::Status Prepare(absl::Span<const Prepared> statements);
  // Statements without parameters, separated by semicolons. Rows of the last that has some.
  absl::StatusOr<PostgresRows> Execute(const std::string& sql);
  absl::StatusOr<PostgresRows> Run(const PostgresStatement& statement);
  // All of them and then COMMIT, sent at once. OK: committed. kUnavailable: it may be.
  absl::Status RunAndCommit(absl::Span<const PostgresStatement> statements);

  bool broken() const { return broken_; }

 private:
  PostgresConnection(pg_conn* connection, absl::Duration timeout) : connection_(connection), timeout_(timeout) {}

  // Sends what is buffered and waits for the next result; null: none is left of this statement.
  absl::StatusOr<pg_result*> NextResult(absl::Time deadline);
  absl::Status Wait(bool write, absl::Time deadline);
  absl::Status Broken(const std::string& what);
  // Reads results until there are none; the first error, or the last rows.
  absl::StatusOr<PostgresRows> Collect(absl::Time deadline);

  pg_conn* const connection_;
  const absl::Duration timeout_;
  bool broken_ = false;
};

// Connections that are open, at most so many at a time. Thread-safe.
class PostgresPool {
 public:
  struct Options {
    std::string url;                             // postgres://USER@HOST:PORT/DATABASE, without password.
    std::string password;                        // Empty: none is needed.
    int connections = 32;                        // At once; more wait.
    absl::Duration timeout = absl::Seconds(15);  // Of one round trip, longer than a lock is waited for.
  };
  PostgresPool(const Options& options, std::vector<PostgresConnection::Prepared> statements)
      : options_(options), statements_(std::move(statements)) {}

  // Given back when it goes, and closed if it broke or is in the middle of something.
  class Lease {
   public:
    Lease(Lease&&) = default;
    ~Lease();
    PostgresConnection* operator->() const { return connection_.get(); }
    // What it holds is in the middle of a transaction no more.
    void set_clean(bool clean) { clean_ = clean; }

   private:
    friend class PostgresPool;
    Lease(PostgresPool* pool, std::unique_ptr<PostgresConnection> connection)
        : pool_(pool), connection_(std::move(connection)) {}
    PostgresPool* pool_;
    std::unique_ptr<PostgresConnection> connection_;
    bool clean_ = true;
  };
  // kUnavailable: none is free in time, or none can be opened.
  absl::StatusOr<Lease> Take() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  const Options options_;
  const std::vector<PostgresConnection::Prepared> statements_;
  absl::Mutex mu_;
  std::vector<std::unique_ptr<PostgresConnection>> idle_ ABSL_GUARDED_BY(mu_);
  int taken_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace rwkv::state_store
