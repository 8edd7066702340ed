#include "services/state_store/catalog/rocksdb/view.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

rocksdb::Slice ToSlice(absl::string_view bytes) { return rocksdb::Slice(bytes.data(), bytes.size()); }
absl::string_view ToView(const rocksdb::Slice& slice) { return absl::string_view(slice.data(), slice.size()); }

absl::Status CorruptRow(absl::string_view key) {
  std::string printable;
  for (const char c : key.substr(0, 64)) {
    if (c >= 0x21 && c <= 0x7e) {
      printable.push_back(c);
    } else {
      absl::StrAppend(&printable, "%", absl::Hex(static_cast<uint8_t>(c), absl::kZeroPad2));
    }
  }
  return absl::DataLossError(absl::StrCat("catalog: row ", printable, " is corrupt"));
}

}  // namespace

absl::StatusOr<View> View::Open(Database& database, At at) {
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database.Read());
  View view(std::move(access));
  if (at == At::kOnce) view.snapshot_ = std::make_unique<rocksdb::ManagedSnapshot>(&view.access_.db());
  return view;
}

absl::StatusOr<View> View::Reopen(Database& database, uint64_t opening) {
  RWKV_ASSIGN_OR_RETURN(View view, Open(database, At::kLatest));
  if (view.opening() != opening) {
    return absl::UnavailableError(absl::StrCat(database.name(), ": opened again meanwhile; nothing was changed"));
  }
  return view;
}

Database::Access View::Close() && {
  snapshot_.reset();
  return std::move(access_);
}

rocksdb::ReadOptions View::Options() const {
  rocksdb::ReadOptions options;
  if (snapshot_ != nullptr) options.snapshot = snapshot_->snapshot();
  return options;
}

std::unique_ptr<rocksdb::Iterator> View::Iterate(const rocksdb::ReadOptions& options) const {
  return std::unique_ptr<rocksdb::Iterator>(access_.db().NewIterator(options, family()));
}

absl::StatusOr<absl::optional<std::string>> View::Get(absl::string_view key) const {
  std::string value;
  const rocksdb::Status status = access_.db().Get(Options(), family(), ToSlice(key), &value);
  if (status.IsNotFound()) return absl::optional<std::string>();
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, "catalog: read failed"));
  return absl::optional<std::string>(std::move(value));
}

absl::StatusOr<bool> View::Get(absl::string_view key, google::protobuf::MessageLite* row) const {
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> value, Get(key));
  if (!value.has_value()) return false;
  if (!row->ParseFromString(*value)) return CorruptRow(key);
  return true;
}

absl::Status View::Scan(
    absl::string_view begin, absl::string_view end,
    absl::FunctionRef<absl::StatusOr<bool>(absl::string_view key, absl::string_view value)> visit) const {
  rocksdb::ReadOptions options = Options();
  const rocksdb::Slice upper = ToSlice(end);
  options.iterate_upper_bound = &upper;
  const std::unique_ptr<rocksdb::Iterator> it = Iterate(options);
  for (it->Seek(ToSlice(begin)); it->Valid(); it->Next()) {
    RWKV_ASSIGN_OR_RETURN(const bool go_on, visit(ToView(it->key()), ToView(it->value())));
    if (!go_on) return absl::OkStatus();
  }
  return FromRocksdbStatus(it->status(), "catalog: read failed");
}

absl::Status View::ScanBack(
    absl::string_view begin, absl::string_view end,
    absl::FunctionRef<absl::StatusOr<bool>(absl::string_view key, absl::string_view value)> visit) const {
  rocksdb::ReadOptions options = Options();
  const rocksdb::Slice lower = ToSlice(begin), upper = ToSlice(end);
  options.iterate_lower_bound = &lower;
  options.iterate_upper_bound = &upper;
  const std::unique_ptr<rocksdb::Iterator> it = Iterate(options);
  for (it->SeekToLast(); it->Valid(); it->Prev()) {
    RWKV_ASSIGN_OR_RETURN(const bool go_on, visit(ToView(it->key()), ToView(it->value())));
    if (!go_on) return absl::OkStatus();
  }
  return FromRocksdbStatus(it->status(), "catalog: read failed");
}

absl::StatusOr<SessionRow> View::Session(absl::string_view session_id) const {
  SessionRow row;
  RWKV_ASSIGN_OR_RETURN(const bool found, Get(SessionKey(session_id), &row));
  if (!found) return absl::NotFoundError(absl::StrCat("session ", session_id, " does not exist"));
  return row;
}

absl::StatusOr<BranchRow> View::Branch(uint64_t branch) const {
  BranchRow row;
  RWKV_ASSIGN_OR_RETURN(const bool found, Get(BranchKey(branch), &row));
  // Ids only grow, so a parent that is not smaller would be a loop.
  if (!found || row.parent() >= branch) return CorruptRow(BranchKey(branch));
  return row;
}

absl::StatusOr<std::vector<Link>> View::Chain(const SessionRow& session) const {
  std::vector<Link> chain;
  uint64_t end = session.length();
  for (uint64_t branch = session.branch(); branch != 0;) {
    RWKV_ASSIGN_OR_RETURN(const BranchRow row, Branch(branch));
    if (row.fork_position() > end) return CorruptRow(BranchKey(branch));
    chain.push_back({branch, row.fork_position(), end});
    end = row.fork_position();
    branch = row.parent();
  }
  return chain;
}

absl::StatusOr<v1::SnapshotManifest> View::Base(const std::vector<Link>& chain) const {
  const std::string key = BaseKey(chain.back().branch);
  v1::SnapshotManifest base;
  RWKV_ASSIGN_OR_RETURN(const bool found, Get(key, &base));
  if (!found) return CorruptRow(key);
  return base;
}

absl::StatusOr<LogChunk> View::ReadLog(const std::vector<Link>& chain, uint64_t begin, uint64_t end,
                                       bool with_logprobs) const {
  LogChunk result;
  result.token_ids.reserve(end - begin);
  if (with_logprobs) result.logprobs.reserve(end - begin);
  uint64_t position = begin;  // The next one to read.
  for (auto link = chain.rbegin(); link != chain.rend() && position < end; ++link) {
    const uint64_t stop = std::min(end, link->end);
    if (position >= stop) continue;
    // The chunk that holds the first position may begin before it.
    rocksdb::ReadOptions options = Options();
    const std::string lower_key = LogKey(link->branch, link->begin), upper_key = LogKey(link->branch, stop);
    const rocksdb::Slice lower = lower_key, upper = upper_key;
    options.iterate_lower_bound = &lower;
    options.iterate_upper_bound = &upper;
    const std::unique_ptr<rocksdb::Iterator> it = Iterate(options);
    for (it->SeekForPrev(LogKey(link->branch, position)); it->Valid() && position < stop; it->Next()) {
      const absl::string_view key = ToView(it->key());
      const uint64_t chunk_begin = SecondNumber(key);
      const absl::optional<LogChunk> chunk = DecodeChunk(ToView(it->value()));
      if (!chunk.has_value()) return CorruptRow(key);
      const uint64_t chunk_end = chunk_begin + chunk->token_ids.size();
      if (chunk_begin > position || chunk_end <= position) break;  // A gap: reported below.
      const size_t from = position - chunk_begin;
      const size_t to = std::min(stop, chunk_end) - chunk_begin;
      result.token_ids.insert(result.token_ids.end(), chunk->token_ids.begin() + from, chunk->token_ids.begin() + to);
      if (with_logprobs && !chunk->logprobs.empty()) {
        result.logprobs.insert(result.logprobs.end(), chunk->logprobs.begin() + from, chunk->logprobs.begin() + to);
      } else if (with_logprobs) {
        result.logprobs.resize(result.token_ids.size());
      }
      position += to - from;
    }
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), "catalog: read failed"));
    if (position < stop) return CorruptRow(LogKey(link->branch, position));
  }
  return result;
}

absl::StatusOr<std::vector<SnapshotAt>> View::Snapshots(uint64_t branch, uint64_t after, uint64_t last) const {
  std::vector<SnapshotAt> snapshots;
  if (after >= last) return snapshots;
  RWKV_RETURN_IF_ERROR(Scan(SnapshotKey(branch, after + 1), SnapshotKey(branch, last) + '\0',
                            [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
                              SnapshotAt& snapshot = snapshots.emplace_back();
                              snapshot.position = SecondNumber(key);
                              if (!snapshot.manifest.ParseFromArray(value.data(), static_cast<int>(value.size()))) {
                                return CorruptRow(key);
                              }
                              return true;
                            }));
  return snapshots;
}

void Edit::Put(absl::string_view key, absl::string_view value) { batch_.Put(family_, ToSlice(key), ToSlice(value)); }

void Edit::Put(absl::string_view key, const google::protobuf::MessageLite& row) {
  batch_.Put(family_, ToSlice(key), row.SerializeAsString());
}

void Edit::Delete(absl::string_view key) { batch_.Delete(family_, ToSlice(key)); }

void Edit::DeleteRange(absl::string_view begin, absl::string_view end) {
  batch_.DeleteRange(family_, ToSlice(begin), ToSlice(end));
}

}  // namespace rwkv::state_store
