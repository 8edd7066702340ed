// Files of a store that has everything in it, damaged at random: whatever becomes of them, nothing is served that is not
// what was stored, `rwkvctl store check` names what is touched, and `repair` saves the rest.
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/db.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/repair.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/testing/random_damage.h"
#include "services/state_store/testing/store_folder.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

using absl::StatusCode;
using testing::AllOf;
using testing::HasSubstr;
using testing::StatusIs;

// Trials of each store. Hundreds: --test_arg=--gtest_repeat=N gives each round another seed.
constexpr int kTrials = 24;
constexpr size_t kSmall = 6000, kLarge = size_t{130} << 10;  // In the database, and in a file.
constexpr char kTenant[] = "acme";

// The bytes of a record follow from its name.
std::string Data(const std::string& snapshot_id, int layer, size_t bytes) {
  return TestRecordData(static_cast<uint32_t>(std::hash<std::string>()(snapshot_id)) + layer, bytes);
}

struct Session {
  std::vector<uint32_t> tokens;               // From `begin` on.
  uint64_t begin = 0;                         // Of an imported one.
  std::map<uint64_t, std::string> snapshots;  // By position; its base is the first of an imported one.
};

// One folder's damage: the file, and in words what became of it.
std::pair<std::string, std::string> Damage(const std::string& folder, std::mt19937& random) {
  // Kinds of files as often as each other, however many there are of each.
  std::map<std::string, std::vector<std::string>> kinds;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = fs::relative(entry.path(), folder).string();
    if (!entry.is_regular_file() || entry.file_size() == 0 || absl::EndsWith(name, "LOCK")) continue;
    std::string kind = entry.path().extension().string();
    if (kind.empty()) kind = entry.path().filename().string().substr(0, 4);
    kinds[(absl::StartsWith(name, "records/") ? "records/" : "") + kind].push_back(name);
  }
  auto kind = kinds.begin();
  std::advance(kind, random() % kinds.size());
  std::sort(kind->second.begin(), kind->second.end());
  const std::string name = kind->second[random() % kind->second.size()];
  std::string bytes = rwkv::testing::ReadFile(folder + "/" + name);
  std::string what;
  switch (random() % 8) {
    case 0:
      fs::remove(folder + "/" + name);
      return {name, "removed"};
    case 1:
      std::fill(bytes.begin(), bytes.end(), '\0');
      what = "all zeros";
      break;
    default:
      what = DamageAtRandom(bytes, random);
  }
  WriteFile(folder + "/" + name, bytes);
  return {name, what};
}

class DamageTrialsTest : public StoreFolderTest {
 protected:
  DamageTrialsTest() : store_(std::make_unique<TestStore>()) { Fill(); }

  absl::StatusOr<v1::SnapshotManifest> Put(const std::string& session_id, uint64_t position, size_t bytes) {
    v1::SnapshotManifest manifest;
    manifest.set_snapshot_id(absl::StrCat("at:", session_id, ":", position));
    manifest.set_session_id(session_id);
    manifest.set_position(position);
    manifest.set_model_fingerprint(kTestModel);
    for (int layer = 0; layer < 2; ++layer) {
      const std::string data = Data(manifest.snapshot_id(), layer, bytes);
      *manifest.add_records() = TestRecordInfo(manifest.snapshot_id(), layer, data);
      if (absl::Status status = store_->records().Put(manifest.records(layer), data); !status.ok()) return status;
    }
    return manifest;
  }

  void AddTurns(const std::string& id, size_t bytes) {
    Session& session = sessions_[id];
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Acquire(id));
    for (uint32_t turn = 0; turn < 4; ++turn) {
      const std::vector<uint32_t> prompt(20, turn), answer(30, static_cast<uint32_t>(sessions_.size()));
      ASSERT_OK(store_->AddTurn(lease, absl::StrCat("r", turn), prompt, answer));
      session.tokens.insert(session.tokens.end(), prompt.begin(), prompt.end());
      session.tokens.insert(session.tokens.end(), answer.begin(), answer.end());
      if (turn % 2 == 0) continue;
      const uint64_t position = session.begin + session.tokens.size();
      ASSERT_OK_AND_ASSIGN(const v1::SnapshotManifest manifest, Put(id, position, bytes));
      ASSERT_OK(store_->store().CommitSnapshot(lease, store_->LogBranch(id), manifest));
      session.snapshots[position] = manifest.snapshot_id();
    }
  }

  // The sessions that there are go from the log to a table.
  void Flush() {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, store_->database().Read());
    ASSERT_TRUE(access.db().Flush({}, {access.family(Family::kMeta), access.family(Family::kCatalog)}).ok());
    for (const auto& [id, session] : sessions_) flushed_.insert(id);
  }

  // Whether damage of this file may cost the session.
  bool MayLose(const std::string& file, const std::string& id) const {
    if (absl::StartsWith(file, "records/")) {
      // A state is what an import has. The rows that speak of its bytes are found again by these and the catalog.
      return sessions_.at(id).begin > 0 &&
             (absl::EndsWith(file, ".record") || absl::EndsWith(file, ".blob") || absl::EndsWith(file, ".log"));
    }
    return absl::EndsWith(file, ".sst") || (absl::EndsWith(file, ".log") && flushed_.count(id) == 0);
  }

  void Fill() {
    for (int i = 0; i < 4; ++i) {
      const std::string id = absl::StrCat("session-", i);
      ASSERT_OK(store_->store().CreateSession(id, ""));
      AddTurns(id, i % 2 == 0 ? kSmall : kLarge);
      if (i != 1) continue;
      ASSERT_OK(store_->catalog().ForkSession("session-0", 120, "fork"));
      Session& fork = sessions_["fork"];
      fork.tokens.assign(sessions_["session-0"].tokens.begin(), sessions_["session-0"].tokens.begin() + 120);
      fork.snapshots.insert(*sessions_["session-0"].snapshots.begin());
      Flush();
    }
    for (const auto& [id, bytes] : std::map<std::string, size_t>{{"import-0", kSmall}, {"import-1", kLarge}}) {
      NewImport import;
      import.base = true;
      ASSERT_OK_AND_ASSIGN(import.manifest, Put(id, 1000, bytes));
      ASSERT_OK(store_->store().ImportSession(id, import));
      sessions_[id].begin = 1000;
      sessions_[id].snapshots[1000] = import.manifest.snapshot_id();
      AddTurns(id, bytes);
    }
    ASSERT_OK(store_->catalog().ForkSession("import-0", absl::nullopt, "fork-of-import"));
    sessions_["fork-of-import"] = sessions_["import-0"];
    TenantUsage usage;
    usage.turns = 7;
    ASSERT_OK(store_->catalog().PutUsage(kTenant, "router-0", usage));
    scope_.set_tenant(kTenant);
    scope_.set_model_fingerprint(kTestModel);
    NewPrefix prefix;
    prefix.scope = scope_;
    prefix.token_ids = prefix_tokens_;
    ASSERT_OK_AND_ASSIGN(prefix.manifest, Put("", prefix_tokens_.size(), kLarge));
    ASSERT_OK(store_->store().PutPrefix(prefix));
  }

  // False: a record of it is not what was stored, and says so.
  static bool IsWhole(RecordStore& records, const v1::SnapshotManifest& manifest) {
    bool whole = true;
    for (const v1::RecordInfo& info : manifest.records()) {
      const auto data = records.Get(info);
      whole &= data.ok();
      const StatusCode code = data.status().code();
      EXPECT_TRUE(code == StatusCode::kOk || code == StatusCode::kDataLoss || code == StatusCode::kNotFound)
          << data.status();
      if (data.ok()) EXPECT_EQ(*data, Data(info.snapshot_id(), info.layer(), info.bytes())) << info.snapshot_id();
    }
    return whole;
  }

  // What a start can see to be missing without reading states, it names in its log.
  void ExpectNamed(StateStore& store, const std::string& log) {
    for (const auto& [id, session] : sessions_) {
      for (const auto& [position, snapshot_id] : session.snapshots) {
        const auto manifest = store.catalog().FindSnapshot(id, position, kTestModel);
        if (!manifest.ok() || !manifest->has_value()) continue;
        for (const v1::RecordInfo& info : (*manifest)->records()) {
          if (store.records().Check(info).ok()) continue;
          EXPECT_THAT(log, AllOf(HasSubstr("states_lost"), HasSubstr((*manifest)->session_id()))) << snapshot_id;
        }
      }
    }
  }

  // Of an open store: each thing is what was stored, or an error, or gone; and what is not as it was is in `said`.
  // Returns the sessions whose tokens are all there.
  std::set<std::string> ExpectHonest(StateStore& store, const std::string& said) {
    std::set<std::string> whole;
    const bool names_all = !absl::StrContains(said, "not known");  // Else those rows are lost that have the names.
    for (const auto& [id, session] : sessions_) {
      SCOPED_TRACE(id);
      const std::string name = absl::StrCat("session ", id, ":");
      const auto found = store.catalog().GetSession(id);
      const absl::StatusOr<TokenPage> page =
          found.ok() ? store.catalog().ReadTokens(id, session.begin, std::max(session.begin, found->token_count()))
                     : absl::StatusOr<TokenPage>(found.status());
      if (page.ok() && page->token_ids == session.tokens) {
        whole.insert(id);
      } else {
        if (names_all || page.ok()) EXPECT_THAT(said, HasSubstr(name)) << page.status();
        // After a repair it may be gone, or older.
        if (page.ok()) {
          const std::vector<uint32_t>& got = page->token_ids;
          EXPECT_TRUE(got.size() <= session.tokens.size() &&
                      std::equal(got.begin(), got.end(), session.tokens.begin()));
        }
        continue;
      }
      for (const auto& [position, snapshot_id] : session.snapshots) {
        const auto manifest = store.catalog().FindSnapshot(id, position, kTestModel);
        const bool there = manifest.ok() && manifest->has_value() && (*manifest)->snapshot_id() == snapshot_id;
        const bool is_whole = there && IsWhole(store.records(), **manifest);
        if (!is_whole && names_all) {
          EXPECT_THAT(said, HasSubstr(name)) << "snapshot " << snapshot_id << ": " << manifest.status();
        }
      }
    }
    const auto usage = store.catalog().GetUsage(kTenant);
    if (names_all && (!usage.ok() || usage->turns != 7)) {
      EXPECT_THAT(said, HasSubstr(absl::StrCat("tenant ", kTenant)));
    }
    const auto prefix = store.FindPrefix(scope_, prefix_tokens_);
    if (prefix.ok() && prefix->has_value()) IsWhole(store.records(), **prefix);
    return whole;
  }

  void Try(const std::string& original, uint32_t seed) {
    std::mt19937 random(seed);
    int refused = 0;
    size_t saved = 0;
    for (int trial = 0; trial < kTrials && !HasFailure(); ++trial) {
      const std::string damaged = Copy(original);
      const auto [file, what] = Damage(damaged, random);
      SCOPED_TRACE(absl::StrCat("seed ", seed, ", trial ", trial, ": ", file, ", ", what));
      std::string said;
      const auto say = [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); };
      const absl::Status checked = CheckStore(damaged, say);
      EXPECT_TRUE(checked.ok() || absl::IsDataLoss(checked)) << checked;
      if (checked.ok()) said.clear();  // Then nothing may be touched.
      {
        const std::string copy = Copy(damaged);
        ::testing::internal::CaptureStderr();
        const auto embedded = Open(copy);
        const std::string log = ::testing::internal::GetCapturedStderr();
        if (embedded.ok()) {
          ExpectNamed((*embedded)->store(), log);
          EXPECT_THAT(said, testing::Not(HasSubstr("does not start")));
          ExpectHonest((*embedded)->store(), said);
        } else {
          ++refused;
          EXPECT_THAT(embedded.status(),
                      StatusIs(StatusCode::kDataLoss, AllOf(HasSubstr(copy), HasSubstr("rwkvctl store repair"))));
          EXPECT_THAT(said, HasSubstr("does not start"));
        }
      }
      said.clear();
      ASSERT_OK(RepairStore(damaged, say)) << said;
      {
        ASSERT_OK_AND_ASSIGN(const auto embedded, Open(damaged));
        ASSERT_OK(CheckCatalogRows(embedded->rows(), 8)) << said;
        const std::set<std::string> whole = ExpectHonest(embedded->store(), said);
        saved += whole.size();
        for (const auto& [id, session] : sessions_) EXPECT_TRUE(whole.count(id) > 0 || MayLose(file, id)) << id;
        if (HasFailure()) ADD_FAILURE() << said;
      }
      std::error_code busy;  // A store that was closed may still delete files of its own.
      fs::remove_all(fs::path(damaged).parent_path(), busy);
    }
    std::printf("seed %u: %d of %d damaged stores did not start, %zu of %zu sessions saved\n", seed, refused, kTrials,
                saved, kTrials * sessions_.size());
  }

  std::unique_ptr<TestStore> store_;
  std::map<std::string, Session> sessions_;
  std::set<std::string> flushed_;
  v1::PrefixScope scope_;
  const std::vector<uint32_t> prefix_tokens_ = std::vector<uint32_t>(40, 5);
};

TEST_F(DamageTrialsTest, OfAStoppedStore) {
  static uint32_t seed = 0;
  const std::string folder = store_->data_dir();
  store_.reset();
  Try(folder, ++seed);
}

TEST_F(DamageTrialsTest, OfAKilledStore) {
  static uint32_t seed = 1000;
  Try(Copy(store_->data_dir()), ++seed);
}

// --- What costs nothing ----------------------------------------------------------------------------------------------

TEST_F(DamageTrialsTest, AListOfTheStatesFilesThatIsGoneOrDamagedCostsNoState) {
  // Of a killed store, then of one that was stopped, whose small records are in blob files.
  for (std::string original : {Copy(store_->data_dir()), std::string()}) {
    if (original.empty()) {
      original = store_->data_dir();
      store_.reset();
    }
    for (const auto& entry : fs::directory_iterator(original + "/records")) {
      const std::string name = entry.path().filename().string();
      if (name != "CURRENT" && !absl::StartsWith(name, "MANIFEST-")) continue;
      const std::string bytes = rwkv::testing::ReadFile(entry.path().string());
      ASSERT_GT(bytes.size(), 10u);
      std::string flipped = bytes;
      flipped[bytes.size() / 2] ^= 1;
      std::vector<absl::optional<std::string>> damages = {absl::nullopt, "", std::string(bytes.size(), '\0'), flipped};
      for (size_t i = 1; i < 8; ++i) damages.push_back(bytes.substr(0, bytes.size() * i / 8));
      for (size_t i = 0; i < damages.size(); ++i) {
        SCOPED_TRACE(absl::StrCat(name, ", damage ", i));
        const std::string folder = Copy(original);
        fs::remove(folder + "/records/" + name);
        if (damages[i].has_value()) WriteFile(folder + "/records/" + name, *damages[i]);
        ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
        EXPECT_EQ(ExpectHonest(embedded->store(), "").size(), sessions_.size());
        if (HasFailure()) return;
      }
    }
  }
}

// --- Repairs that are broken off -------------------------------------------------------------------------------------

// What a repair has done, step by step, as files: after each of them the process may have been killed.
TEST_F(DamageTrialsTest, ARepairThatWasBrokenOffIsEndedByTheNextAndTheStoreDoesNotStartEmpty) {
  const std::string original = Copy(store_->data_dir());
  ASSERT_OK(RepairStore(Copy(original), [](const std::string&) {})) << "nothing to do";
  // The repaired database, made of a damaged one.
  const std::string repaired = Copy(original);
  WriteFile(repaired + "/CURRENT", "");
  ASSERT_OK(RepairStore(repaired, [](const std::string&) {}));
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(repaired)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file() && name != "LOCK" && name != "CURRENT") files.push_back(name);
  }
  for (const char* phase : {".repaired.ready", ".repaired.moving"}) {
    for (const size_t moved : {size_t{0}, size_t{1}, files.size()}) {
      SCOPED_TRACE(absl::StrCat(phase, ", ", moved, " files moved"));
      const std::string folder = Copy(original);
      // The damaged files: all there but CURRENT, or all gone.
      for (const auto& entry : fs::directory_iterator(folder)) {
        const bool gone = phase == std::string(".repaired.moving") || entry.path().filename() == "CURRENT";
        if (entry.is_regular_file() && gone) fs::remove(entry.path());
      }
      fs::create_directories(folder + "/" + phase);
      for (size_t i = 0; i < files.size(); ++i) {
        const bool in_place = phase == std::string(".repaired.moving") && i < moved;
        fs::copy(repaired + "/" + files[i], folder + (in_place ? "/" : absl::StrCat("/", phase, "/")) + files[i]);
      }
      fs::copy(repaired + "/CURRENT", folder + "/" + phase + "/CURRENT");
      EXPECT_THAT(Open(folder), StatusIs(StatusCode::kDataLoss, HasSubstr("rwkvctl store repair")));
      const auto ignore = [](const std::string&) {};
      EXPECT_THAT(CheckStore(folder, ignore), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("broken off")));
      std::string said;
      ASSERT_OK(RepairStore(folder, [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); }));
      EXPECT_THAT(said, HasSubstr("broken off"));
      ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
      EXPECT_EQ(ExpectHonest(embedded->store(), "").size(), sessions_.size());
      EXPECT_FALSE(fs::exists(folder + "/" + phase));
    }
  }
}

TEST_F(DamageTrialsTest, ARescueOfStatesThatWasBrokenOffGoesOn) {
  const std::string original = Copy(store_->data_dir());
  const auto manifest = [](const std::string& folder) {
    for (const auto& entry : fs::directory_iterator(folder + "/records")) {
      if (absl::StartsWith(entry.path().filename().string(), "MANIFEST")) return entry.path().string();
    }
    return std::string();
  };
  // Damaged beyond opening, and all the same nothing is lost: the tables and the log are whole.
  const std::string whole = Copy(original);
  fs::resize_file(manifest(whole), 40);
  {
    ASSERT_OK_AND_ASSIGN(const auto embedded, Open(whole));
    EXPECT_EQ(ExpectHonest(embedded->store(), "").size(), sessions_.size());
  }
  ASSERT_TRUE(fs::exists(whole + "/records.damaged-0"));
  // While the saved ones were written; before they were in place; before their files were.
  for (const int step : {0, 1, 2}) {
    SCOPED_TRACE(step);
    const std::string folder = Copy(original);
    fs::copy(whole + "/records", folder + "/records.saved");  // Without the folder of files.
    if (step > 0) fs::rename(folder + "/records", folder + "/records.damaged-0");
    if (step > 1) fs::rename(folder + "/records.damaged-0/files", folder + "/records.saved/files");
    if (step > 0) EXPECT_THAT(CheckStore(folder, [](const std::string&) {}), StatusIs(StatusCode::kFailedPrecondition));
    ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
    EXPECT_EQ(ExpectHonest(embedded->store(), "").size(), sessions_.size());
    EXPECT_FALSE(fs::exists(folder + "/records.saved"));
  }
}

}  // namespace
}  // namespace rwkv::state_store
