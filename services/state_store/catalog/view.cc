#include "services/state_store/catalog/view.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

absl::Status CorruptRow(absl::string_view key) {
  return absl::DataLossError(absl::StrCat("catalog: row ", PrintableKey(key), " is corrupt"));
}

}  // namespace

absl::StatusOr<bool> View::Get(absl::string_view key, google::protobuf::MessageLite* row) const {
  RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> value, Get(key));
  if (!value.has_value()) return false;
  if (!row->ParseFromString(*value)) return CorruptRow(key);
  return true;
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
    std::string first = LogKey(link->branch, position);
    RWKV_RETURN_IF_ERROR(ScanBack(LogKey(link->branch, link->begin), first + '\0',
                                  [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
                                    first = std::string(key);
                                    return false;
                                  }));
    RWKV_RETURN_IF_ERROR(Scan(
        first, LogKey(link->branch, stop), [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
          const uint64_t chunk_begin = SecondNumber(key);
          const absl::optional<LogChunk> chunk = DecodeChunk(value);
          if (!chunk.has_value()) return CorruptRow(key);
          const uint64_t chunk_end = chunk_begin + chunk->token_ids.size();
          if (chunk_begin > position || chunk_end <= position) return false;  // A gap: reported below.
          const size_t from = position - chunk_begin;
          const size_t to = std::min(stop, chunk_end) - chunk_begin;
          result.token_ids.insert(result.token_ids.end(), chunk->token_ids.begin() + from,
                                  chunk->token_ids.begin() + to);
          if (with_logprobs && !chunk->logprobs.empty()) {
            result.logprobs.insert(result.logprobs.end(), chunk->logprobs.begin() + from, chunk->logprobs.begin() + to);
          } else if (with_logprobs) {
            result.logprobs.resize(result.token_ids.size());
          }
          position += to - from;
          return position < stop;
        }));
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

}  // namespace rwkv::state_store
