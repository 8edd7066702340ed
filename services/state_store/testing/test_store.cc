#include "services/state_store/testing/test_store.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/iterator.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/rows.pb.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/rows/numbers.h"

namespace rwkv::state_store {
namespace {

std::vector<std::pair<std::string, std::string>> Rows(Database& database, Family family) {
  std::vector<std::pair<std::string, std::string>> rows;
  const absl::StatusOr<Database::Access> access = database.Read();
  if (!access.ok()) return rows;
  const std::unique_ptr<rocksdb::Iterator> it(access->db().NewIterator(rocksdb::ReadOptions(), access->family(family)));
  for (it->SeekToFirst(); it->Valid(); it->Next()) rows.emplace_back(it->key().ToString(), it->value().ToString());
  return rows;
}

// Of the catalog.
std::vector<std::pair<std::string, std::string>> Rows(RowStore& store) {
  std::vector<std::pair<std::string, std::string>> rows;
  const absl::StatusOr<std::unique_ptr<RowReader>> reader = store.Read();
  if (!reader.ok()) return rows;
  const absl::Status status =
      (*reader)->Scan("b", "z", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
        if (key != "next_id" && key[0] != 'd') rows.emplace_back(key, value);
        return true;
      });
  if (!status.ok()) std::fprintf(stderr, "Rows: %s\n", status.ToString().c_str());
  return rows;
}

}  // namespace

std::string NewTestFolder() {
  static std::atomic<int> next{0};
  const std::string folder = absl::StrCat(::testing::TempDir(), "/state_store_test.", getpid(), ".", next.fetch_add(1));
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

std::string TestRecordData(uint32_t seed, size_t bytes) {
  std::string data(bytes, '\0');
  uint32_t x = seed * 2654435761u + 1;
  for (char& c : data) {
    x = x * 1664525u + 1013904223u;
    c = static_cast<char>(x >> 24);
  }
  return data;
}

v1::RecordInfo TestRecordInfo(const std::string& snapshot_id, int layer, const std::string& data) {
  v1::RecordInfo info;
  info.set_snapshot_id(snapshot_id);
  info.set_layer(layer);
  info.set_bytes(data.size());
  info.set_crc32c(Crc32c(data));
  return info;
}

namespace {

template <typename Server>
Server& Launched() {
  // Ended with the process' static objects, after which nobody needs it.
  static const absl::StatusOr<std::unique_ptr<Server>> server = Server::Launch();
  if (!server.ok()) {
    std::fprintf(stderr, "TestStore: %s\n", server.status().ToString().c_str());
    std::abort();
  }
  return **server;
}

}  // namespace

rwkv::testing::PostgresServer& SharedPostgres() { return Launched<rwkv::testing::PostgresServer>(); }
rwkv::testing::S3Server& SharedS3() { return Launched<rwkv::testing::S3Server>(); }

TestStore::TestStore(const Options& options) : is_shared_(options.shared) {
  if (is_shared_) {
    static std::atomic<int> next{0};
    shared_options_.catalog.url = SharedPostgres().url();
    shared_options_.catalog.password = SharedPostgres().password();
    shared_options_.records.endpoint = SharedS3().endpoint();
    shared_options_.records.bucket = rwkv::testing::S3Server::kBucket;
    shared_options_.records.access_key = rwkv::testing::S3Server::kAccessKey;
    shared_options_.records.secret_key = rwkv::testing::S3Server::kSecretKey;
    shared_options_.tenant = options.tenant.empty() ? absl::StrCat("tenant-", next.fetch_add(1)) : options.tenant;
    shared_options_.rules.snapshots_per_branch = options.snapshots_per_branch;
    shared_options_.store.limits = options.limits;
    shared_options_.store.prefix_cache_bytes = options.prefix_cache_bytes;
    shared_options_.sweep_interval = shared_options_.session_sweep_interval = absl::ZeroDuration();
    shared_options_.recount_interval = absl::ZeroDuration();
  }
  options_.database.data_dir = options.data_dir.empty() && !is_shared_ ? NewTestFolder() : options.data_dir;
  options_.database.env = options.env;
  options_.database.resume_interval = absl::ZeroDuration();
  options_.catalog.snapshots_per_branch = options.snapshots_per_branch;
  options_.store.limits = options.limits;
  options_.store.prefix_cache_bytes = options.prefix_cache_bytes;
  options_.sweep_interval = absl::ZeroDuration();
  options_.session_sweep_interval = absl::ZeroDuration();
  options_.reclaim_interval = absl::ZeroDuration();
  options_.resume_check_interval = absl::ZeroDuration();
  if (const absl::Status status = Reopen(); !status.ok()) {
    std::fprintf(stderr, "TestStore: %s\n", status.ToString().c_str());
    std::abort();
  }
}

absl::Status TestStore::Reopen() {
  embedded_.reset();
  shared_.reset();
  RWKV_ASSIGN_OR_RETURN(metrics_, common::Metrics::Create(""));
  if (is_shared_) {
    RWKV_ASSIGN_OR_RETURN(shared_, SharedStateStore::Create(shared_options_, &clock_, metrics_.get()));
    return absl::OkStatus();
  }
  RWKV_ASSIGN_OR_RETURN(embedded_, EmbeddedStateStore::Create(options_, &clock_, metrics_.get()));
  return absl::OkStatus();
}

absl::StatusOr<v1::Lease> TestStore::Acquire(const std::string& session_id) {
  RWKV_ASSIGN_OR_RETURN(LeaseGrant grant, catalog().AcquireLease(session_id, "router-0", "1", absl::Minutes(1)));
  return std::move(grant.lease);
}

absl::StatusOr<v1::Lease> TestStore::Create(const std::string& session_id) {
  RWKV_RETURN_IF_ERROR(store().CreateSession(session_id, "").status());
  return Acquire(session_id);
}

absl::Status TestStore::AddTurn(const v1::Lease& lease, const std::string& request_id,
                                const std::vector<uint32_t>& prompt, const std::vector<uint32_t>& generated) {
  NewTurn turn;
  turn.request_id = request_id;
  turn.token_ids = prompt;
  turn.spec = "spec";
  turn.model_fingerprint = kTestModel;
  RWKV_ASSIGN_OR_RETURN(const TurnStart start, store().BeginTurn(lease, turn));
  return AppendOne(catalog(), TestAppend(lease, request_id, start.session_tokens, generated, v1::FINISH_REASON_LENGTH));
}

absl::StatusOr<std::vector<uint32_t>> TestStore::Tokens(const std::string& session_id) {
  RWKV_ASSIGN_OR_RETURN(const v1::Session session, catalog().GetSession(session_id));
  RWKV_ASSIGN_OR_RETURN(TokenPage page, catalog().ReadTokens(session_id, session.log_begin(), session.token_count()));
  return std::move(page.token_ids);
}

std::string TestStore::LogBranch(const std::string& session_id) {
  const absl::StatusOr<TokenPage> page = catalog().ReadTokens(session_id, 0, 0);
  return page.ok() ? page->log_branch : page.status().ToString();
}

absl::StatusOr<v1::SnapshotManifest> TestStore::PutSnapshot(const std::string& session_id,
                                                            const std::string& snapshot_id, uint64_t position) {
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id(snapshot_id);
  manifest.set_session_id(session_id);
  manifest.set_position(position);
  manifest.set_model_fingerprint(kTestModel);
  for (int layer = 0; layer < 2; ++layer) {
    const std::string data = TestRecordData(static_cast<uint32_t>(position * 2 + layer), 6000);
    *manifest.add_records() = TestRecordInfo(snapshot_id, layer, data);
    RWKV_RETURN_IF_ERROR(records().Put(manifest.records(layer), data));
  }
  return manifest;
}

absl::Status TestStore::AddSnapshot(const v1::Lease& lease, const std::string& snapshot_id, uint64_t position) {
  RWKV_ASSIGN_OR_RETURN(const v1::SnapshotManifest manifest, PutSnapshot(lease.session_id(), snapshot_id, position));
  return store().CommitSnapshot(lease, LogBranch(lease.session_id()), manifest);
}

absl::StatusOr<v1::Session> TestStore::Import(const std::string& session_id, const std::string& snapshot_id,
                                              uint64_t position, const std::vector<uint32_t>& token_ids, bool base) {
  NewImport import;
  RWKV_ASSIGN_OR_RETURN(import.manifest, PutSnapshot(session_id, snapshot_id, position));
  import.token_ids = token_ids;
  import.base = base;
  return store().ImportSession(session_id, import);
}

std::vector<std::string> TestStore::CatalogKeys() {
  std::vector<std::string> keys;
  for (const auto& [key, value] : Rows(rows())) keys.push_back(key);
  return keys;
}

std::vector<std::string> TestStore::RecordKeys() {
  std::vector<std::string> keys;
  if (is_shared_) {
    // Objects: "tenant-3%2Fsnapshot%2F...". Twice, as if each had an info beside it.
    const std::string prefix = tenant() + "%2F";
    for (const auto& entry : std::filesystem::directory_iterator(SharedS3().bucket_folder())) {
      const std::string name = entry.path().filename().string();
      if (name.substr(0, prefix.size()) == prefix) keys.insert(keys.end(), 2, name.substr(prefix.size()));
    }
    return keys;
  }
  for (const Family family : {Family::kRecordInfos, Family::kRecords}) {
    for (const auto& [key, value] : Rows(records_database(), family)) keys.push_back(key);
  }
  return keys;
}

int64_t TestStore::LogTokens() {
  int64_t tokens = 0;
  for (const auto& [key, value] : Rows(rows())) {
    if (key[0] == 'l') tokens += static_cast<int64_t>(DecodeChunk(value)->token_ids.size());
  }
  return tokens;
}

v1::AppendItem TestAppend(const v1::Lease& lease, const std::string& request_id, uint64_t expected_length,
                          const std::vector<uint32_t>& token_ids, v1::FinishReason finish_reason) {
  v1::AppendItem item;
  *item.mutable_lease() = lease;
  item.set_request_id(request_id);
  item.set_expected_length(expected_length);
  for (const uint32_t token_id : token_ids) {
    item.add_token_ids(token_id);
    item.add_logprobs(-static_cast<float>(token_id));
  }
  item.set_finish_reason(finish_reason);
  return item;
}

absl::Status AppendOne(Catalog& catalog, const v1::AppendItem& item) { return catalog.AppendTokens({&item}).front(); }

absl::Status RemoveIdleRows(RowStore& store) {
  const auto rows = Rows(store);
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> edit, store.Begin({}));
  for (const auto& [key, value] : rows) {
    if (key[0] == 'u') edit->Delete(key);
    SessionRow row;
    if (key[0] != 's' || !row.ParseFromString(value)) continue;
    row.clear_idle_minute();
    row.clear_use_unix_nanos();
    edit->Put(key, row.SerializeAsString());
  }
  return edit->Commit();
}

absl::Status CheckCatalogRows(RowStore& store, int snapshots_per_branch) {
  struct Branch {
    BranchRow row;
    uint64_t end = 0;
    int heads = 0;
    std::map<uint64_t, uint64_t> children;
    std::map<uint64_t, std::string> snapshots;
    absl::optional<v1::SnapshotManifest> base;
    std::map<uint64_t, uint64_t> chunks;  // Begin to end.
  };
  std::map<uint64_t, Branch> branches;
  std::map<std::string, SessionRow> sessions;
  std::map<std::string, std::pair<uint64_t, uint64_t>> ids;
  std::set<std::string> turn_sessions;
  std::map<std::string, int> turns;
  std::map<std::string, uint64_t> idle;  // Session to minute.
  std::set<std::string> prefixes;
  std::map<std::string, std::string> prefix_uses, prefix_ages;  // y-key to x-key.
  const auto rows = Rows(store);
  const auto broken = [](const auto&... parts) { return absl::InternalError(absl::StrCat(parts...)); };
  for (const auto& [key, value] : rows) {
    switch (key[0]) {
      case 's':
        if (!sessions[key.substr(1)].ParseFromString(value)) return broken("session ", key.substr(1), " unreadable");
        break;
      case 'b':
        if (!branches[FirstNumber(key)].row.ParseFromString(value)) return broken("branch unreadable");
        break;
      case 'e':
        branches[FirstNumber(key)].children[NumberAt(key, 17)] = SecondNumber(key);
        break;
      case 'l': {
        const absl::optional<LogChunk> chunk = DecodeChunk(value);
        if (!chunk.has_value()) return broken("chunk unreadable");
        branches[FirstNumber(key)].chunks[SecondNumber(key)] = SecondNumber(key) + chunk->token_ids.size();
        break;
      }
      case 'p': {
        v1::SnapshotManifest manifest;
        if (!manifest.ParseFromString(value)) return broken("manifest unreadable");
        if (manifest.position() != SecondNumber(key)) return broken("manifest at another position");
        branches[FirstNumber(key)].snapshots[SecondNumber(key)] = manifest.snapshot_id();
        break;
      }
      case 'm':
        if (!branches[FirstNumber(key)].base.emplace().ParseFromString(value)) return broken("base unreadable");
        break;
      case 'i':
        ids[key.substr(1)] = {NumberAt(value, 0), NumberAt(value, 8)};
        break;
      case 'u':  // MINUTE SESSION
        if (!idle.emplace(key.substr(9), FirstNumber(key)).second)
          return broken("session ", key.substr(9), " idles twice");
        break;
      case 't':
        ++turns[key.substr(1, key.find('\0') - 1)];
        break;
      case 'g': {
        UsageRow usage;
        if (!usage.ParseFromString(value)) return broken("usage unreadable");
        break;
      }
      case 'c':
        prefixes.insert(key.substr(1));
        break;
      case 'x': {
        PrefixUseRow use;
        if (!use.ParseFromString(value)) return broken("use of a prefix unreadable");
        prefix_uses[PrefixUseKey(use.minute(), use.snapshot_id())] = key;
        break;
      }
      case 'y':
        prefix_ages[key] = value;
        break;
      default:
        return broken("a row of no known kind");
    }
  }
  if (prefix_uses != prefix_ages) return broken("prefixes are not where they were used");
  for (const auto& [key, index] : prefix_ages) {
    if (prefixes.erase(key.substr(9)) == 0) return broken("a prefix without content");
  }
  if (!prefixes.empty()) return broken(prefixes.size(), " prefixes that nobody finds");
  if (idle.size() != sessions.size()) return broken(idle.size(), " idle for ", sessions.size(), " sessions");
  for (const auto& [id, row] : sessions) {
    if (idle.count(id) == 0 || idle[id] != row.idle_minute()) return broken("session ", id, " is not where it idles");
    const auto branch = branches.find(row.branch());
    if (branch == branches.end()) return broken("session ", id, " is on no branch");
    branch->second.end = row.length();
    ++branch->second.heads;
  }
  for (const auto& [id, count] : turns) {
    if (sessions.count(id) == 0) return broken("turns of no session ", id);
    if (count > kTurnsKept) return broken("session ", id, " has ", count, " turns");
  }
  size_t snapshots = 0;
  for (auto& [id, branch] : branches) {
    const auto name = absl::StrCat("branch ", id);
    if (branch.row.is_head() != (branch.heads == 1) || branch.heads > 1) return broken(name, ": heads");
    if (branch.row.parent() != 0) {
      const auto parent = branches.find(branch.row.parent());
      if (parent == branches.end()) return broken(name, ": no parent");
      const auto edge = parent->second.children.find(id);
      if (edge == parent->second.children.end() || edge->second != branch.row.fork_position()) {
        return broken(name, ": not known to its parent");
      }
      const uint64_t parent_begin = parent->second.row.fork_position();
      if (branch.row.fork_position() < parent_begin ||
          (branch.row.fork_position() == parent_begin && !parent->second.base.has_value())) {
        return broken(name, ": needless parent");
      }
      if (branch.base.has_value()) return broken(name, ": a base beside a parent");
    } else if (branch.row.fork_position() != 0 &&
               (!branch.base.has_value() || branch.base->position() != branch.row.fork_position())) {
      return broken(name, ": begins at ", branch.row.fork_position(), " of nothing");
    }
    if (!branch.row.is_head() && branch.children.empty()) return broken(name, ": used by nobody");
    uint64_t forked_end = 0;
    for (const auto& [child, position] : branch.children) {
      if (branches.count(child) == 0 || branches[child].row.parent() != id) return broken(name, ": child ", child);
      forked_end = std::max(forked_end, position);
    }
    if (!branch.row.is_head()) branch.end = forked_end;
    if (branch.end < forked_end) return broken(name, ": ends before a fork");
    uint64_t position = branch.row.fork_position();
    for (const auto& [begin, end] : branch.chunks) {
      if (begin != position || end <= begin) return broken(name, ": a gap at ", position);
      position = end;
    }
    if (position != branch.end) return broken(name, ": tokens to ", position, ", wants ", branch.end);
    if (branch.snapshots.size() > snapshots_per_branch + branch.children.size()) {
      return broken(name, ": ", branch.snapshots.size(), " snapshots");
    }
    if (branch.base.has_value()) {
      const auto id_row = ids.find(branch.base->snapshot_id());
      if (id_row == ids.end() || id_row->second != std::make_pair(id, branch.base->position())) {
        return broken(name, ": the base's id");
      }
      if (branch.base->position() > branch.end) return broken(name, ": ends before its base");
      ++snapshots;
    }
    for (const auto& [at, snapshot_id] : branch.snapshots) {
      if (at <= branch.row.fork_position() || at > branch.end) return broken(name, ": snapshot at ", at);
      if (ids.count(snapshot_id) == 0 || ids[snapshot_id] != std::make_pair(id, at)) return broken(name, ": ids");
      ++snapshots;
    }
  }
  if (snapshots != ids.size()) return broken(ids.size(), " ids for ", snapshots, " snapshots");
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
