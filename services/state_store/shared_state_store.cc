#include "services/state_store/shared_state_store.h"

#include <algorithm>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"

namespace rwkv::state_store {
namespace {

constexpr absl::Duration kLastPause = absl::Seconds(1);
constexpr absl::Duration kSayInterval = absl::Seconds(30);

// The lines of a file of secrets, without blanks around; empty ones are left out.
absl::StatusOr<std::vector<std::string>> Lines(const std::string& path) {
  std::ifstream in(path);
  if (!in) return absl::UnavailableError(absl::StrCat("cannot read ", path));
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) {
    line = std::string(absl::StripAsciiWhitespace(line));
    if (!line.empty()) lines.push_back(line);
  }
  return lines;
}

std::unique_ptr<common::Periodic> Chore(absl::Duration interval, const char* failure,
                                        std::function<absl::Status()> chore) {
  if (interval <= absl::ZeroDuration()) return nullptr;
  return std::make_unique<common::Periodic>(interval, [failure, chore = std::move(chore)] {
    if (const absl::Status status = chore(); !status.ok()) common::LogWarning(failure, {{"error", status}});
  });
}

}  // namespace

absl::Status SharedStateStore::ParseRecords(const std::string& url, Options* options) {
  absl::string_view rest = url;
  if (!absl::ConsumePrefix(&rest, "s3://") || rest.empty() || rest[0] == '/') {
    return absl::InvalidArgumentError(absl::StrCat("--records is '", url, "', want s3://BUCKET[/PREFIX]"));
  }
  const size_t slash = rest.find('/');
  options->records.bucket = std::string(rest.substr(0, slash));
  options->records_prefix = slash == absl::string_view::npos ? "" : std::string(rest.substr(slash + 1));
  if (!options->records_prefix.empty() && !absl::EndsWith(options->records_prefix, "/")) {
    options->records_prefix += '/';
  }
  return absl::OkStatus();
}

absl::Status SharedStateStore::ReadS3Credentials(const std::string& path, S3Client::Options* options) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<std::string> lines, Lines(path));
  if (lines.size() != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has ", lines.size(), " lines, want two: the access key and the secret key"));
  }
  options->access_key = lines[0];
  options->secret_key = lines[1];
  return absl::OkStatus();
}

absl::StatusOr<std::string> SharedStateStore::ReadPassword(const std::string& path) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<std::string> lines, Lines(path));
  if (lines.size() == 1) return lines[0];
  return absl::InvalidArgumentError(absl::StrCat(path, " has ", lines.size(), " lines, want one: the password"));
}

absl::StatusOr<std::unique_ptr<SharedStateStore>> SharedStateStore::Create(const Options& options, common::Clock* clock,
                                                                           common::Metrics* metrics) {
  RWKV_RETURN_IF_ERROR(SessionLimits::Check(options.store.limits));
  RowCatalog::Options rules = options.rules;
  rules.how_sessions_end = SessionLimits::HowSessionsEnd(options.store.limits);
  std::unique_ptr<SharedStateStore> shared(new SharedStateStore());
  RWKV_ASSIGN_OR_RETURN(shared->rows_, PostgresRowStore::Open(options.catalog));
  shared->tenant_rows_ = std::make_unique<TenantRows>(shared->rows_.get(), options.tenant);
  RWKV_ASSIGN_OR_RETURN(shared->catalog_, RowCatalog::Create(rules, shared->tenant_rows_.get(), clock, metrics));
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<S3Client> client, S3Client::Create(options.records));
  RWKV_ASSIGN_OR_RETURN(shared->records_, S3RecordStore::Create(std::move(client),
                                                                absl::StrCat(options.records_prefix, options.tenant,
                                                                             options.tenant.empty() ? "" : "/"),
                                                                metrics));
  shared->store_ =
      std::make_unique<StateStore>(options.store, shared->catalog_.get(), shared->records_.get(), clock, metrics);
  StateStore* const store = shared->store_.get();
  shared->sweep_ = Chore(options.sweep_interval, "orphan_sweep_failed", [store] { return store->SweepOrphans(); });
  shared->session_sweep_ =
      Chore(options.session_sweep_interval, "session_sweep_failed", [store] { return store->SweepSessions(); });
  shared->recount_ = Chore(options.recount_interval, "recount_failed",
                           [catalog = shared->catalog_.get()] { return catalog->Recount(); });
  const CatalogCounts counts = shared->catalog_->counts();
  common::LogInfo(
      "state_store_open",
      {{"catalog", options.catalog.url},
       {"records", absl::StrCat(options.records.endpoint, "/", options.records.bucket, "/", options.records_prefix)},
       {"sessions", counts.sessions},
       {"snapshots", counts.snapshots},
       {"leases", counts.leases}});
  return shared;
}

absl::StatusOr<std::unique_ptr<SharedStateStore>> SharedStateStore::CreateWhenReachable(
    const Options& options, common::Clock* clock, common::Metrics* metrics, absl::FunctionRef<bool()> stopped) {
  absl::Duration pause = absl::Milliseconds(50);
  absl::Time say_at = absl::InfinitePast();
  for (;;) {
    absl::StatusOr<std::unique_ptr<SharedStateStore>> shared = Create(options, clock, metrics);
    if (!absl::IsUnavailable(shared.status())) return shared;
    if (absl::Now() >= say_at) {
      common::LogWarning("waiting", {{"why", shared.status()}});
      say_at = absl::Now() + kSayInterval;
    }
    for (const absl::Time until = absl::Now() + pause; absl::Now() < until; absl::SleepFor(absl::Milliseconds(10))) {
      if (stopped()) return absl::CancelledError("stopped before PostgreSQL and S3 could be reached");
    }
    pause = std::min(2 * pause, kLastPause);
  }
}

}  // namespace rwkv::state_store
