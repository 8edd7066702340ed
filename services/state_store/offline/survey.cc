#include "services/state_store/offline/survey.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/env.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/lost_rows.h"
#include "services/state_store/catalog/rows.pb.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/kept_rows.h"
#include "services/state_store/offline/scratch.h"
#include "services/state_store/offline/survey_rows.h"
#include "services/state_store/records/rocksdb/open_records.h"
#include "services/state_store/records/rocksdb/rocksdb_record_store.h"
#include "services/state_store/rocksdb/ack_journal.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rows/rocksdb/rocksdb_row_store.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

struct Part {
  uint64_t branch = 0, begin = 0, end = 0;
};

// The parts of a session's log, newest first. An error: what is missing.
absl::StatusOr<std::vector<Part>> Chain(const Survey& survey, const SessionRow& session) {
  std::vector<Part> chain;
  uint64_t end = session.length();
  for (uint64_t branch = session.branch(); branch != 0;) {
    const auto row = survey.rows.find(BranchKey(branch));
    BranchRow parsed;
    if (row == survey.rows.end() || !parsed.ParseFromString(row->second)) {
      return absl::DataLossError(absl::StrCat("branch ", branch, " of its log is gone"));
    }
    if (parsed.parent() >= branch || parsed.fork_position() > end) {
      return absl::DataLossError(absl::StrCat("branch ", branch, " of its log contradicts itself"));
    }
    chain.push_back({branch, parsed.fork_position(), end});
    end = parsed.fork_position();
    branch = parsed.parent();
  }
  return chain;
}

// Rows of one kind whose first number is `branch`.
template <typename Visit>
void ForBranch(const std::map<std::string, std::string>& rows, char kind, uint64_t branch, Visit visit) {
  const std::string end = NumberKey(kind, branch + 1);
  for (auto row = rows.lower_bound(NumberKey(kind, branch)); row != rows.end() && row->first < end; ++row) {
    visit(row->first, row->second);
  }
}

absl::Status CheckSession(const Survey& survey, const std::string& id, const SessionRow& session) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<Part> chain, Chain(survey, session));
  for (const Part& part : chain) {
    uint64_t position = part.begin;
    ForBranch(survey.rows, 'l', part.branch, [&](const std::string& key, const std::string& value) {
      const absl::optional<LogChunk> chunk = DecodeChunk(value);
      if (chunk.has_value() && SecondNumber(key) == position) position += chunk->token_ids.size();
    });
    if (position < part.end) {
      return absl::DataLossError(absl::StrCat("tokens from ", position, " on are gone, of ", session.length()));
    }
  }
  if (session.has_base_position() && survey.rows.count(BaseKey(chain.back().branch)) == 0) {
    return absl::DataLossError("the state that it was imported with is gone");
  }
  if (session.has_open_turn() && survey.rows.count(TurnKey(id, session.open_turn().sequence())) == 0) {
    return absl::DataLossError("its open turn is gone");
  }
  return absl::OkStatus();
}

// Whether rows of turns that are remembered are gone with blocks that cannot be read. Only the open turn is known to be
// there from elsewhere; a rewind forgets turns, too.
bool MayHaveLostTurns(const Survey& survey, const std::string& id, const SessionRow& session) {
  const uint64_t end = session.next_turn();
  const uint64_t begin = end > kTurnsKept ? end - kTurnsKept : 1;
  for (uint64_t sequence = begin; sequence < end && !survey.gaps.empty(); ++sequence) {
    const std::string key = TurnKey(id, sequence);
    if (survey.InGap(key) && survey.rows.count(key) == 0) return true;
  }
  return false;
}

// Unset: it is gone, or there is none of that id.
absl::optional<v1::SnapshotManifest> FindManifest(const Survey& survey, const std::string& snapshot_id) {
  v1::SnapshotManifest manifest;
  if (const auto at = survey.rows.find(SnapshotIdKey(snapshot_id));
      at != survey.rows.end() && at->second.size() == 16) {
    const uint64_t branch = NumberAt(at->second, 0);
    for (const std::string& key : {SnapshotKey(branch, NumberAt(at->second, 8)), BaseKey(branch)}) {
      const auto row = survey.rows.find(key);
      const bool found = row != survey.rows.end() && manifest.ParseFromString(row->second);
      if (found && manifest.snapshot_id() == snapshot_id) return manifest;
    }
  }
  PrefixRow prefix;
  const auto row = survey.rows.find(PrefixKey(snapshot_id));
  if (row == survey.rows.end() || !prefix.ParseFromString(row->second)) return absl::nullopt;
  return manifest.ParseFromString(prefix.manifest()) ? absl::make_optional(manifest) : absl::nullopt;
}

// Sessions, tokens, branches; and what the journal says must be there.
void CheckCatalog(const AcknowledgedRows& acknowledged, const std::map<std::string, uint32_t>& seals, Survey& survey) {
  std::map<std::string, SessionRow> sessions;
  for (const auto& [key, value] : survey.rows) {
    // The state of one tells of it, too; but it may have been deleted, and a fork hold the state.
    v1::SnapshotManifest manifest;
    if ((key[0] == 'p' || key[0] == 'm') && !survey.gaps.empty() && manifest.ParseFromString(value) &&
        survey.InGap(SessionKey(manifest.session_id()))) {
      survey.sessions.insert(manifest.session_id());
    }
    if (key[0] == 's') sessions[key.substr(1)].ParseFromString(value);
    // A place among the idle, or a turn, tells of a session whose own row is gone.
    if (key[0] == 'u') survey.sessions.insert(std::string(IdleSessionId(key)));
    for (const std::string& session : LostSessions({key})) survey.sessions.insert(session);
    if (key[0] == 'b') survey.next_id = std::max(survey.next_id, FirstNumber(key) + 1);
    if (key[0] == 'i') ++survey.snapshots;
    if (key[0] == 'i' && value.size() == 16 && !FindManifest(survey, key.substr(1)).has_value()) {
      survey.lost_snapshots.emplace(NumberAt(value, 0), NumberAt(value, 8));
    }
    if (key == "next_id" && value.size() == 8) survey.next_id = std::max(survey.next_id, NumberAt(value, 0));
    if (key[0] == 'l') {
      const absl::optional<LogChunk> chunk = DecodeChunk(value);
      if (chunk.has_value()) survey.tokens += static_cast<int64_t>(chunk->token_ids.size());
    }
  }
  std::vector<std::string> lost;
  for (const auto& [key, row] : acknowledged.rows) {
    const auto seal = seals.find(key);
    absl::optional<uint32_t> stored;
    if (seal != seals.end()) stored = seal->second;
    if (acknowledged.Agrees(key, stored)) continue;
    lost.push_back(key);
    NoteLost(key, "acknowledged changes of it are gone", survey);
  }
  for (const std::string& id : LostSessions(lost)) {
    survey.sessions.insert(id);
    survey.regressed[id] = "acknowledged changes of it are gone";
  }
  for (const std::string& id : survey.sessions) {
    const auto session = sessions.find(id);
    if (session == sessions.end()) {
      survey.damaged[id] =
          survey.InGap(SessionKey(id)) ? "its row is gone with a block that cannot be read" : "its row is gone";
    } else {
      survey.next_id = std::max(survey.next_id, session->second.lease().fencing_token() + 1);
      const absl::Status status = CheckSession(survey, id, session->second);
      if (!status.ok()) survey.damaged[id] = std::string(status.message());
      if (MayHaveLostTurns(survey, id, session->second)) {
        survey.regressed[id] = "turns of it may be gone: a request_id of one of them would run again";
      }
    }
    if (survey.damaged.count(id) > 0) survey.regressed.erase(id);
  }
  // Reserved in blocks: what was reserved and not written may have been given out.
  survey.next_id += 4096;
}

// What the loss of states does to the sessions that reach them, forks too. `bases`: branches whose base is lost.
void NameSessions(const std::map<std::pair<uint64_t, uint64_t>, std::string>& states, const std::set<uint64_t>& bases,
                  Survey& survey) {
  for (const std::string& id : survey.sessions) {
    SessionRow session;
    const auto row = survey.rows.find(SessionKey(id));
    if (row == survey.rows.end() || !session.ParseFromString(row->second)) continue;
    const absl::StatusOr<std::vector<Part>> chain = Chain(survey, session);
    if (!chain.ok() || chain->empty()) continue;
    if (session.has_base_position() && bases.count(chain->back().branch) > 0) {
      survey.damaged[id] = "the state that it was imported with is gone";
      survey.regressed.erase(id);
    }
    for (const Part& part : *chain) {
      const auto state = states.upper_bound({part.branch, part.begin});
      if (state != states.end() && state->first <= std::make_pair(part.branch, part.end)) {
        survey.stateless[id] = absl::StrCat("the state at ", state->first.second, " is ", state->second);
      }
    }
  }
}

// Of the store in `data_dir`.
absl::Status CheckRecords(const std::string& data_dir, Survey& survey) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  common::SystemClock clock;
  Database::Options options;
  options.data_dir = data_dir;
  // As the store does, which leaves out what is damaged.
  absl::StatusOr<OpenedRecords> opened = OpenRecords(options, metrics.get());
  RocksdbRecordStore::Committed committed;
  committed.check_all = opened.ok() && (opened->rescued || !opened->database->log_is_whole());
  committed.find = [&](const std::string& id) { return FindManifest(survey, id); };
  const auto records = opened.ok()
                           ? RocksdbRecordStore::Create(opened->database.get(), &clock, metrics.get(), committed)
                           : absl::StatusOr<std::unique_ptr<RocksdbRecordStore>>(opened.status());
  std::map<std::pair<uint64_t, uint64_t>, std::string> states;
  std::set<uint64_t> bases;
  for (const auto& at : survey.lost_snapshots) states[at] = "gone";
  for (const auto& [key, value] : survey.rows) {
    if (key[0] != 'p' && key[0] != 'm') continue;
    v1::SnapshotManifest manifest;
    if (!manifest.ParseFromString(value)) continue;
    for (const v1::RecordInfo& info : manifest.records()) {
      ++survey.records;
      const absl::Status status = records.ok() ? (*records)->Get(info).status() : records.status();
      if (status.ok()) continue;
      ++survey.bad_records;
      if (key[0] == 'm') {
        bases.insert(FirstNumber(key));
      } else {
        states[{FirstNumber(key), manifest.position()}] = "damaged";
      }
    }
  }
  NameSessions(states, bases, survey);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Survey> SurveyStore(const std::string& data_dir) {
  RWKV_ASSIGN_OR_RETURN(const std::string scratch, CopyToScratch(data_dir));
  const auto remove = absl::MakeCleanup([&] {
    std::error_code ignored;
    std::filesystem::remove_all(scratch, ignored);
  });
  Survey survey;
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  const AcknowledgedRows acknowledged = AckJournal(rocksdb::Env::Default(), data_dir).Read();
  std::map<std::string, uint32_t> seals;
  {
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Database> database,
                          OpenScratch(scratch, metrics.get(), &survey.opening));
    RWKV_RETURN_IF_ERROR(ReadRows(*database, survey, seals));
    if (survey.opening.empty()) {
      // After the rows were read: it may change some.
      RocksdbRowStore rows(database.get());
      common::SystemClock clock;
      survey.opening =
          std::string(StartCatalog(RowCatalog::Options(), *database, &rows, &clock, metrics.get()).status().message());
    }
    survey.unreadable_tables = CountLostTables(scratch);
  }
  TakeKeptRows(scratch, acknowledged, metrics.get(), survey, seals);
  CheckCatalog(acknowledged, seals, survey);
  RWKV_RETURN_IF_ERROR(CheckRecords(scratch, survey));
  return survey;
}

std::map<std::string, std::string> SurvivingRows(const Survey& survey) {
  struct Use {
    uint64_t begin = 0, end = 0;
    bool head = false;
  };
  std::map<uint64_t, Use> branches;
  std::map<std::string, std::string> rows;
  for (const auto& [key, value] : survey.rows) {
    if (key[0] == 'g') rows.emplace(key, value);
  }
  for (const std::string& id : survey.sessions) {
    SessionRow session;
    if (survey.damaged.count(id) > 0 || !session.ParseFromString(survey.rows.at(SessionKey(id)))) continue;
    const absl::StatusOr<std::vector<Part>> chain = Chain(survey, session);
    if (!chain.ok()) continue;
    for (const Part& part : *chain) {
      Use& use = branches[part.branch];
      use.begin = part.begin;
      use.end = std::max(use.end, part.end);
    }
    branches[session.branch()].head = true;
    const auto loss = survey.regressed.find(id);
    if (loss != survey.regressed.end()) session.set_loss(loss->second);
    if (session.idle_minute() != 0) rows[IdleKey(session.idle_minute(), id)] = "";
    rows[SessionKey(id)] = session.SerializeAsString();
    const std::string turns_end = TurnKey(id, UINT64_MAX);
    for (auto turn = survey.rows.lower_bound(TurnKey(id, 0)); turn != survey.rows.end() && turn->first < turns_end;
         ++turn) {
      rows.insert(*turn);
    }
  }
  for (const auto& [branch, use] : branches) {
    BranchRow row;
    row.ParseFromString(survey.rows.at(BranchKey(branch)));
    row.set_is_head(use.head);
    rows[BranchKey(branch)] = row.SerializeAsString();
    if (row.parent() != 0) rows[EdgeKey(row.parent(), row.fork_position(), branch)] = "";
    const uint64_t end = use.end;
    const uint64_t id = branch;
    const auto keep_snapshot = [&](const std::string& key, const std::string& value) {
      v1::SnapshotManifest manifest;
      if (!manifest.ParseFromString(value) || (key[0] == 'p' && SecondNumber(key) > end)) return;
      rows[key] = value;
      std::string at;
      AppendNumber(at, id);
      AppendNumber(at, manifest.position());
      rows[SnapshotIdKey(manifest.snapshot_id())] = at;
    };
    ForBranch(survey.rows, 'p', branch, keep_snapshot);
    ForBranch(survey.rows, 'm', branch, keep_snapshot);
    ForBranch(survey.rows, 'l', branch, [&](const std::string& key, const std::string& value) {
      const absl::optional<LogChunk> chunk = DecodeChunk(value);
      if (!chunk.has_value() || SecondNumber(key) >= end) return;
      const size_t tokens = std::min<uint64_t>(chunk->token_ids.size(), end - SecondNumber(key));
      rows[key] = EncodeChunk(absl::MakeConstSpan(chunk->token_ids).first(tokens),
                              absl::MakeConstSpan(chunk->logprobs).first(std::min(tokens, chunk->logprobs.size())));
    });
  }
  return rows;
}

}  // namespace rwkv::state_store
