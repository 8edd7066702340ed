#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/common/clock.h"
#include "services/common/disk_metrics.h"
#include "services/common/logging.h"
#include "services/common/main_loop.h"
#include "services/common/memory.h"
#include "services/common/metrics.h"
#include "services/common/rpc_server.h"
#include "services/common/security/security.h"
#include "services/common/security/server_flags.h"
#include "services/common/tracing/trace_flags.h"
#include "services/common/tracing/tracer.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/repair.h"
#include "services/state_store/rpc/state_catalog_service.h"
#include "services/state_store/rpc/state_records_service.h"
#include "services/state_store/session_limits.h"
#include "services/state_store/shared_state_store.h"

ABSL_FLAG(std::string, name, "state_store-0", "Name of this process, in logs, metrics and Describe.");
ABSL_FLAG(std::string, listen, "127.0.0.1:0", "HOST:PORT to serve on; port 0 picks a free one.");
ABSL_FLAG(std::string, metrics_listen, "127.0.0.1:0", "HOST:PORT of /metrics; empty: none.");
ABSL_FLAG(std::string, port_file, "", "File to write the addresses to once serving; empty: none.");
ABSL_FLAG(std::string, data_dir, "",
          "Folder of the embedded store, made if missing; one process at a time. Required, unless --catalog is given.");
ABSL_FLAG(
    std::string, catalog, "",
    "postgres://USER@HOST:PORT/DATABASE, without password: the catalog in PostgreSQL, for any number of processes. "
    "Needs --records.");
ABSL_FLAG(std::string, catalog_password_file, "",
          "File with the password for --catalog, one line; empty: none needed.");
ABSL_FLAG(std::string, records, "", "s3://BUCKET[/PREFIX]: the state records in S3. Needs --catalog.");
ABSL_FLAG(std::string, s3_endpoint, "", "http://HOST:PORT or https://HOST of the S3 server; addresses are path-style.");
ABSL_FLAG(std::string, s3_region, "us-east-1", "Region that S3 requests are signed for.");
ABSL_FLAG(std::string, s3_credentials_file, "", "File with two lines: access key, secret key.");
ABSL_FLAG(std::string, offline, "",
          "check, repair or move a stopped embedded store in --data_dir, and end (`rwkvctl store`). move: to --catalog "
          "and --records.");
ABSL_FLAG(int, snapshots_per_branch, 8, "Newest snapshots kept of each branch of a log, besides those forks need.");
ABSL_FLAG(absl::Duration, orphan_age, absl::Hours(1), "State records that no snapshot has named are deleted after it.");
ABSL_FLAG(absl::Duration, sweep_interval, absl::Minutes(10), "Time between two searches for such records; 0: never.");
ABSL_FLAG(absl::Duration, session_idle_ttl, absl::ZeroDuration(),
          "Sessions that nobody has used for so long are deleted; 0: never.");
ABSL_FLAG(int64_t, max_stored_bytes, 0,
          "Bound on the bytes of all sessions: state records, and 8 for each token of the logs. 0: none.");
ABSL_FLAG(int64_t, max_sessions, 0, "Bound on the number of sessions. 0: none.");
ABSL_FLAG(std::string, when_full, "refuse",
          "At a bound: refuse new sessions and turns, or evict: delete the sessions that were idle for longest.");
ABSL_FLAG(
    int64_t, prefix_cache_bytes, int64_t{1} << 30,
    "Bound on the states of shared beginnings of inputs (the prefix cache), beside --max_stored_bytes: the longest "
    "unused go. 0: none are kept.");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(10), "Time that calls have to end after SIGTERM.");

namespace rwkv::state_store {
namespace {

absl::StatusOr<SharedStateStore::Options> SharedOptions(const EmbeddedStateStore::Options& common) {
  if (absl::GetFlag(FLAGS_catalog).empty() || absl::GetFlag(FLAGS_records).empty()) {
    return absl::InvalidArgumentError("--catalog and --records: one without the other");
  }
  if (absl::GetFlag(FLAGS_offline).empty() && !absl::GetFlag(FLAGS_data_dir).empty()) {
    return absl::InvalidArgumentError("--data_dir and --catalog: one of them");
  }
  SharedStateStore::Options options;
  options.catalog.url = absl::GetFlag(FLAGS_catalog);
  if (const std::string path = absl::GetFlag(FLAGS_catalog_password_file); !path.empty()) {
    RWKV_ASSIGN_OR_RETURN(options.catalog.password, SharedStateStore::ReadPassword(path));
  }
  RWKV_RETURN_IF_ERROR(SharedStateStore::ParseRecords(absl::GetFlag(FLAGS_records), &options));
  if (absl::GetFlag(FLAGS_s3_endpoint).empty() || absl::GetFlag(FLAGS_s3_credentials_file).empty()) {
    return absl::InvalidArgumentError("--records wants --s3_endpoint and --s3_credentials_file");
  }
  RWKV_RETURN_IF_ERROR(SharedStateStore::ReadS3Credentials(absl::GetFlag(FLAGS_s3_credentials_file), &options.records));
  options.records.endpoint = absl::GetFlag(FLAGS_s3_endpoint);
  options.records.region = absl::GetFlag(FLAGS_s3_region);
  options.rules = common.catalog;
  options.store = common.store;
  options.sweep_interval = common.sweep_interval;
  return options;
}

// SIGTERM or SIGINT waits to be taken; no thread takes it before the server does.
bool ToldToEnd() {
  sigset_t pending;
  return sigpending(&pending) == 0 && (sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1);
}

absl::Status RunOffline(const std::string& what) {
  const std::string data_dir = absl::GetFlag(FLAGS_data_dir);
  const auto say = [](const std::string& line) { std::printf("%s\n", line.c_str()); };
  if (data_dir.empty()) return absl::InvalidArgumentError("--offline wants --data_dir");
  if (what == "check") return CheckStore(data_dir, say);
  if (what == "repair") return RepairStore(data_dir, say);
  if (what != "move") return absl::InvalidArgumentError(absl::StrCat("--offline='", what, "': check, repair or move"));
  RWKV_ASSIGN_OR_RETURN(const SharedStateStore::Options to, SharedOptions({}));
  return MoveStore(data_dir, to, say);
}

absl::Status CheckFlags() {
  RWKV_RETURN_IF_ERROR(common::CheckServerFlags(absl::GetFlag(FLAGS_listen), absl::GetFlag(FLAGS_metrics_listen),
                                                absl::GetFlag(FLAGS_drain_timeout)));
  if (absl::GetFlag(FLAGS_catalog).empty() && absl::GetFlag(FLAGS_records).empty() &&
      absl::GetFlag(FLAGS_data_dir).empty()) {
    return absl::InvalidArgumentError("--data_dir is required, or --catalog and --records");
  }
  if (absl::GetFlag(FLAGS_prefix_cache_bytes) < 0) {
    return absl::InvalidArgumentError("--prefix_cache_bytes is negative; 0 means none");
  }
  // A record is there before the snapshot that names it: without patience it would be deleted between the two.
  if (absl::GetFlag(FLAGS_orphan_age) < absl::Minutes(1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--orphan_age: ", absl::FormatDuration(absl::GetFlag(FLAGS_orphan_age)), " is less than a minute"));
  }
  if (absl::GetFlag(FLAGS_sweep_interval) < absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--sweep_interval is negative; 0 means never");
  }
  return absl::OkStatus();
}

absl::Status Run() {
  const std::string name = absl::GetFlag(FLAGS_name);
  common::InitLogging(name);
  common::KeepFreedMemory();
  if (const std::string what = absl::GetFlag(FLAGS_offline); !what.empty()) return RunOffline(what);
  RWKV_RETURN_IF_ERROR(CheckFlags());
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics,
                        common::Metrics::Create(absl::GetFlag(FLAGS_metrics_listen), {{"process", name}}));
  RWKV_ASSIGN_OR_RETURN(
      const std::unique_ptr<common::Security> security,
      common::Security::Create(common::SecurityOptionsFromFlags(common::Role::kStore), metrics.get()));
  RWKV_ASSIGN_OR_RETURN(
      const std::unique_ptr<common::Tracer> tracer,
      common::Tracer::Create(common::TracerOptionsFromFlags("rwkv-state-store", name), metrics.get()));
  common::SystemClock clock;

  EmbeddedStateStore::Options options;
  options.database.data_dir = absl::GetFlag(FLAGS_data_dir);
  options.catalog.snapshots_per_branch = absl::GetFlag(FLAGS_snapshots_per_branch);
  options.store.orphan_age = absl::GetFlag(FLAGS_orphan_age);
  options.store.prefix_cache_bytes = absl::GetFlag(FLAGS_prefix_cache_bytes);
  options.store.limits.idle_ttl = absl::GetFlag(FLAGS_session_idle_ttl);
  options.store.limits.max_stored_bytes = absl::GetFlag(FLAGS_max_stored_bytes);
  options.store.limits.max_sessions = absl::GetFlag(FLAGS_max_sessions);
  RWKV_ASSIGN_OR_RETURN(options.store.limits.when_full, SessionLimits::ParseWhenFull(absl::GetFlag(FLAGS_when_full)));
  options.sweep_interval = absl::GetFlag(FLAGS_sweep_interval);
  std::unique_ptr<SharedStateStore> shared;
  std::unique_ptr<EmbeddedStateStore> embedded;
  if (!absl::GetFlag(FLAGS_catalog).empty() || !absl::GetFlag(FLAGS_records).empty()) {
    RWKV_ASSIGN_OR_RETURN(const SharedStateStore::Options shared_options, SharedOptions(options));
    absl::StatusOr<std::unique_ptr<SharedStateStore>> reached =
        SharedStateStore::CreateWhenReachable(shared_options, &clock, metrics.get(), ToldToEnd);
    if (absl::IsCancelled(reached.status())) return absl::OkStatus();
    RWKV_ASSIGN_OR_RETURN(shared, std::move(reached));
  } else {
    RWKV_ASSIGN_OR_RETURN(embedded, EmbeddedStateStore::Create(options, &clock, metrics.get()));
    metrics->Add(std::make_shared<common::DiskMetrics>("rwkv_state_store", options.database.data_dir));
  }
  StateStore& store = shared != nullptr ? shared->store() : embedded->store();

  StateCatalogService catalog({name, getpid(), metrics->address()}, &store, metrics.get());
  StateRecordsService records({}, &store.records(), metrics.get());
  common::RpcServer::Options server_options;
  server_options.name = name;
  server_options.listen_address = absl::GetFlag(FLAGS_listen);
  server_options.health_address = common::HealthAddressFromFlags();
  server_options.credentials = security->ForServer();
  server_options.metrics = metrics.get();
  server_options.tracer = tracer.get();
  server_options.metrics_address = metrics->address();
  server_options.port_file = absl::GetFlag(FLAGS_port_file);
  server_options.bulk = true;
  server_options.drain_timeout = absl::GetFlag(FLAGS_drain_timeout);
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::RpcServer> server,
                        common::RpcServer::Start(server_options, {&catalog, &records}));
  server->SetServing(true);
  return server->ServeUntilSignal();
}

}  // namespace
}  // namespace rwkv::state_store

int main(int argc, char** argv) {
  return rwkv::common::RunMain(argc, argv, "Keeps sessions: token logs, leases and state snapshots.",
                               rwkv::state_store::Run);
}
