// Rows in PostgreSQL, for any number of store processes. Laws: rows/row_store.h.
//
// Locks are advisory locks of the transaction, on a 64-bit hash of their name: names that collide only wait for each
// other. The server makes transactions that commit at the same time durable together. A change that collided with
// another process' in an unforeseen way is rolled back by the server, and kUnavailable.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/state_store/rows/postgres/connection.h"
#include "services/state_store/rows/row_store.h"

namespace rwkv::state_store {

class PostgresRowStore final : public RowStore {
 public:
  // Brings the schema to this build's version; the first process to come does it. kInvalidArgument: the URL is none, or
  // holds a password. kFailedPrecondition: the schema is of a newer build, or the server does not let us in.
  // kUnavailable: it does not answer.
  static absl::StatusOr<std::unique_ptr<PostgresRowStore>> Open(const PostgresPool::Options& options);

  absl::StatusOr<std::unique_ptr<RowTransaction>> Begin(const std::vector<std::string>& locks) override;
  absl::StatusOr<std::unique_ptr<RowReader>> Read() override;
  bool shared() const override { return true; }

  // Sees to it that ids given out from now on are at least so large: for rows that were copied from elsewhere.
  absl::Status RaiseNextId(uint64_t at_least);

 private:
  class Transaction;

  explicit PostgresRowStore(const PostgresPool::Options& options);
  static absl::Status Migrate(PostgresConnection& connection);

  PostgresPool pool_;
};

}  // namespace rwkv::state_store
