#include "services/state_store/rows/postgres/connection.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "postgresql/libpq-fe.h"

namespace rwkv::state_store {
namespace {

std::string OneLine(absl::string_view text) {
  std::string line(text);
  while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) line.pop_back();
  std::replace(line.begin(), line.end(), '\n', ' ');
  return line;
}

// What went wrong, by SQLSTATE (PostgreSQL's manual, appendix A).
absl::Status ToStatus(const PGresult* result) {
  const char* const field = PQresultErrorField(result, PG_DIAG_SQLSTATE);
  const std::string state = field == nullptr ? "" : field;
  const std::string message = absl::StrCat("PostgreSQL: ", OneLine(PQresultErrorMessage(result)), " (", state, ")");
  if (state == "53100") return absl::ResourceExhaustedError(message);  // disk_full
  if (absl::StartsWith(state, "XX00")) return absl::DataLossError(message);
  if (state == "55P03") return absl::UnavailableError(absl::StrCat("rows are busy with an earlier call: ", message));
  // Connections, resources, interventions, deadlocks, what was rolled back for another, a server that only reads, and a
  // transaction that this process stopped in: again.
  for (const char* const prefix : {"08", "40", "53", "55", "57", "58", "25006", "25P03"}) {
    if (absl::StartsWith(state, prefix)) return absl::UnavailableError(message);
  }
  if (absl::StartsWith(state, "28") || absl::StartsWith(state, "42501") || absl::StartsWith(state, "3D")) {
    return absl::FailedPreconditionError(message);
  }
  return absl::InternalError(message);
}

}  // namespace

absl::StatusOr<std::unique_ptr<PostgresConnection>> PostgresConnection::Open(const std::string& url,
                                                                             const std::string& password,
                                                                             absl::Duration timeout) {
  std::vector<const char*> keys = {"dbname", "connect_timeout", "application_name", "options"};
  // A change is durable when it is acknowledged, whatever the database's own setting says. A store that stops within a
  // transaction (it is between two statements for microseconds) holds locks that other stores wait for: not for long.
  std::vector<const char*> values = {url.c_str(), "5", "rwkv_state_store",
                                     "-c synchronous_commit=on -c lock_timeout=10s -c statement_timeout=14s -c "
                                     "idle_in_transaction_session_timeout=4s"};
  if (!password.empty()) {
    keys.push_back("password");
    values.push_back(password.c_str());
  }
  keys.push_back(nullptr);
  values.push_back(nullptr);
  // In steps, since PQconnectdb() waits for a server that is silent for as long as it likes.
  PGconn* const raw = PQconnectStartParams(keys.data(), values.data(), /*expand_dbname=*/1);
  if (raw == nullptr) return absl::ResourceExhaustedError("PostgreSQL: no memory for a connection");
  std::unique_ptr<PostgresConnection> connection(new PostgresConnection(raw, timeout));
  const absl::Time deadline = absl::Now() + absl::Seconds(5);
  PostgresPollingStatusType state = PGRES_POLLING_WRITING;
  while (PQstatus(raw) != CONNECTION_BAD && state != PGRES_POLLING_OK && state != PGRES_POLLING_FAILED) {
    RWKV_RETURN_IF_ERROR(connection->Wait(state == PGRES_POLLING_WRITING, deadline));
    state = PQconnectPoll(raw);
  }
  if (PQstatus(raw) != CONNECTION_OK) {
    const std::string message = absl::StrCat("PostgreSQL: ", OneLine(PQerrorMessage(raw)));
    for (const char* const refusal : {"authentication failed", "no password supplied", "does not exist", "no pg_hba"}) {
      if (absl::StrContains(message, refusal)) return absl::FailedPreconditionError(message);
    }
    return absl::UnavailableError(message);
  }
  PQsetnonblocking(raw, 1);
  return connection;
}

PostgresConnection::~PostgresConnection() { PQfinish(connection_); }

absl::Status PostgresConnection::Broken(const std::string& what) {
  broken_ = true;
  return absl::UnavailableError(absl::StrCat("PostgreSQL: ", what));
}

absl::Status PostgresConnection::Wait(bool write, absl::Time deadline) {
  for (;;) {
    const int64_t left = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left <= 0) return Broken("no answer in time");
    pollfd entry{PQsocket(connection_), static_cast<int16_t>(write ? POLLIN | POLLOUT : POLLIN), 0};
    const int ready = poll(&entry, 1, static_cast<int>(left));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return Broken(std::strerror(errno));
  }
}

absl::StatusOr<PGresult*> PostgresConnection::NextResult(absl::Time deadline) {
  for (;;) {
    const int unsent = PQflush(connection_);
    if (unsent < 0) return Broken(OneLine(PQerrorMessage(connection_)));
    if (unsent == 0 && PQisBusy(connection_) == 0) return PQgetResult(connection_);
    RWKV_RETURN_IF_ERROR(Wait(unsent == 1, deadline));
    if (PQconsumeInput(connection_) == 0) return Broken(OneLine(PQerrorMessage(connection_)));
    if (unsent == 1) continue;
  }
}

absl::StatusOr<PostgresRows> PostgresConnection::Collect(absl::Time deadline) {
  PostgresRows rows;
  absl::Status status;
  for (;;) {
    RWKV_ASSIGN_OR_RETURN(PGresult* const result, NextResult(deadline));
    if (result == nullptr) break;
    switch (PQresultStatus(result)) {
      case PGRES_COMMAND_OK:
        break;
      case PGRES_TUPLES_OK:
        rows.clear();
        for (int i = 0; i < PQntuples(result); ++i) {
          std::vector<std::string>& row = rows.emplace_back();
          for (int j = 0; j < PQnfields(result); ++j) {
            row.emplace_back(PQgetvalue(result, i, j), static_cast<size_t>(PQgetlength(result, i, j)));
          }
        }
        break;
      default:
        if (status.ok()) status = ToStatus(result);
    }
    PQclear(result);
  }
  if (PQstatus(connection_) != CONNECTION_OK) broken_ = true;
  RWKV_RETURN_IF_ERROR(status);
  return rows;
}

absl::Status PostgresConnection::Prepare(absl::Span<const Prepared> statements) {
  for (const Prepared& statement : statements) {
    if (PQsendPrepare(connection_, statement.name, statement.sql, 0, nullptr) == 0) {
      return Broken(OneLine(PQerrorMessage(connection_)));
    }
    RWKV_RETURN_IF_ERROR(Collect(absl::Now() + timeout_).status());
  }
  return absl::OkStatus();
}

absl::StatusOr<PostgresRows> PostgresConnection::Execute(const std::string& sql) {
  if (PQsendQuery(connection_, sql.c_str()) == 0) return Broken(OneLine(PQerrorMessage(connection_)));
  return Collect(absl::Now() + timeout_);
}

namespace {

bool Send(PGconn* connection, const PostgresStatement& statement) {
  std::vector<const char*> values;
  std::vector<int> lengths, formats;
  for (const std::string& parameter : statement.parameters) {
    values.push_back(parameter.data());
    lengths.push_back(static_cast<int>(parameter.size()));
    formats.push_back(1);
  }
  return PQsendQueryPrepared(connection, statement.name.c_str(), static_cast<int>(values.size()), values.data(),
                             lengths.data(), formats.data(), /*resultFormat=*/1) != 0;
}

}  // namespace

absl::StatusOr<PostgresRows> PostgresConnection::Run(const PostgresStatement& statement) {
  if (!Send(connection_, statement)) return Broken(OneLine(PQerrorMessage(connection_)));
  return Collect(absl::Now() + timeout_);
}

absl::Status PostgresConnection::RunAndCommit(absl::Span<const PostgresStatement> statements) {
  const absl::Time deadline = absl::Now() + timeout_;
  bool sent = PQenterPipelineMode(connection_) != 0;
  for (const PostgresStatement& statement : statements) sent = sent && Send(connection_, statement);
  sent = sent && Send(connection_, {"commit", {}}) && PQpipelineSync(connection_) != 0;
  if (!sent) return Broken(OneLine(PQerrorMessage(connection_)));
  absl::Status status;
  // A result, then a null, for each statement; then the sync's own.
  for (bool synced = false; !synced;) {
    RWKV_ASSIGN_OR_RETURN(PGresult* const result, NextResult(deadline));
    if (result == nullptr) {
      if (PQstatus(connection_) != CONNECTION_OK) return Broken(OneLine(PQerrorMessage(connection_)));
      continue;
    }
    switch (PQresultStatus(result)) {
      case PGRES_PIPELINE_SYNC:
        synced = true;
        break;
      case PGRES_COMMAND_OK:
      case PGRES_TUPLES_OK:
      case PGRES_PIPELINE_ABORTED:
        break;
      default:
        if (status.ok()) status = ToStatus(result);
        if (PQstatus(connection_) != CONNECTION_OK) {
          PQclear(result);
          broken_ = true;
          return absl::IsInternal(status) ? absl::UnavailableError(status.message()) : status;
        }
    }
    PQclear(result);
  }
  if (PQexitPipelineMode(connection_) == 0) broken_ = true;
  return status;
}

PostgresPool::Lease::~Lease() {
  if (connection_ == nullptr) return;  // Moved from.
  absl::MutexLock lock(&pool_->mu_);
  --pool_->taken_;
  if (clean_ && !connection_->broken()) {
    pool_->idle_.push_back(std::move(connection_));
  } else {
    // What other connections there are is likely dead too, if the server is.
    if (connection_->broken()) pool_->idle_.clear();
  }
}

absl::StatusOr<PostgresPool::Lease> PostgresPool::Take() {
  {
    absl::MutexLock lock(&mu_);
    const auto free = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return taken_ < options_.connections; };
    if (!mu_.AwaitWithTimeout(absl::Condition(&free), absl::Seconds(10))) {
      return absl::UnavailableError(absl::StrCat("PostgreSQL: all ", options_.connections, " connections are busy"));
    }
    ++taken_;
    if (!idle_.empty()) {
      Lease lease(this, std::move(idle_.back()));
      idle_.pop_back();
      return lease;
    }
  }
  absl::StatusOr<std::unique_ptr<PostgresConnection>> connection =
      PostgresConnection::Open(options_.url, options_.password, options_.timeout);
  absl::Status status = connection.status();
  if (status.ok()) status = (*connection)->Prepare(statements_);
  if (status.ok()) return Lease(this, *std::move(connection));
  absl::MutexLock lock(&mu_);
  --taken_;
  return status;
}

}  // namespace rwkv::state_store
