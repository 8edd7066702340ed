// Random operations against the embedded store and against a plain model of it, compared after each.
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::IsEmpty;

constexpr int kSnapshotsPerBranch = 3;
constexpr uint32_t kFirstSharedSeed = 100;  // From there on the store is a shared one.

struct ModelTurn {
  std::string request_id;
  uint64_t begin = 0, prompt_count = 0, token_count = 0;
  bool open = true;
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
};

// A session with a whole copy of its log.
struct ModelSession {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs;    // As many.
  absl::optional<uint64_t> base;  // Position of the imported state that it stands on.
  uint64_t log_begin = 0;         // Of the tokens before it only the number is known.
  std::deque<ModelTurn> turns;
  std::string model;
  std::string holder, incarnation;  // Empty: released.
  uint64_t fencing_token = 0;
  absl::Time expiry;
};

class CatalogModelTest : public ::testing::TestWithParam<uint32_t> {
 protected:
  CatalogModelTest() : random_(GetParam()), env_(rocksdb::NewMemEnv(rocksdb::Env::Default())) {
    TestStore::Options options;
    options.data_dir = "/model_test";
    options.env = env_.get();
    options.snapshots_per_branch = kSnapshotsPerBranch;
    options.shared = GetParam() >= kFirstSharedSeed;
    store_ = std::make_unique<TestStore>(options);
  }

  uint64_t Below(uint64_t n) { return n == 0 ? 0 : random_() % n; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }
  Catalog& catalog() { return store_->catalog(); }
  std::string AnyId() { return absl::StrCat("s", Below(8)); }
  ModelSession* Model(const std::string& id) { return sessions_.count(id) ? &sessions_[id] : nullptr; }

  // Mostly the current lease, sometimes an older token.
  v1::Lease AnyLease(const std::string& id) {
    v1::Lease lease;
    lease.set_session_id(id);
    const ModelSession* session = Model(id);
    lease.set_fencing_token(session == nullptr ? 1 : std::max<uint64_t>(1, session->fencing_token));
    if (OneIn(10)) lease.set_fencing_token(std::max<uint64_t>(1, lease.fencing_token() - 1));
    return lease;
  }
  // The code that the lease alone leads to.
  StatusCode LeaseCode(const v1::Lease& lease) {
    const ModelSession* session = Model(lease.session_id());
    if (session == nullptr) return StatusCode::kNotFound;
    return session->holder.empty() || session->fencing_token != lease.fencing_token() ? StatusCode::kAborted
                                                                                      : StatusCode::kOk;
  }

  void Create(const std::string& id) {
    const auto session = catalog().CreateSession(id, "");
    ASSERT_EQ(session.status().code(), Model(id) ? StatusCode::kAlreadyExists : StatusCode::kOk);
    if (session.ok()) sessions_[id] = ModelSession();
  }

  void Import(const std::string& id) {
    NewImport import;
    import.base = OneIn(2);
    std::vector<uint32_t> tokens(import.base ? Below(4) : 1 + Below(4));
    for (uint32_t& token : tokens) token = static_cast<uint32_t>(random_());
    const bool has_log = !import.base || OneIn(2);
    const std::string snapshot_id = absl::StrCat("x", snapshots_.size());
    const std::string data = TestRecordData(static_cast<uint32_t>(snapshots_.size()), 100);
    import.manifest.set_snapshot_id(snapshot_id);
    import.manifest.set_session_id(id);
    import.manifest.set_position(tokens.size());
    import.manifest.set_model_fingerprint("model-0");
    *import.manifest.add_records() = TestRecordInfo(snapshot_id, 0, data);
    if (has_log) import.token_ids = tokens;
    ASSERT_OK(store_->records().Put(import.manifest.records(0), data));
    snapshots_[snapshot_id] = tokens;
    const auto session = store_->store().ImportSession(id, import);
    ASSERT_EQ(session.status().code(), Model(id) ? StatusCode::kAlreadyExists : StatusCode::kOk);
    if (!session.ok()) return;
    ModelSession& model = sessions_[id] = ModelSession();
    model.tokens = tokens;
    model.logprobs.resize(tokens.size());
    model.model = "model-0";
    if (import.base) model.base = tokens.size();
    model.log_begin = has_log ? 0 : tokens.size();
  }

  void Acquire(const std::string& id) {
    const std::string holder = absl::StrCat("router-", Below(2)), incarnation = absl::StrCat(Below(2));
    ModelSession* session = Model(id);
    const auto grant = catalog().AcquireLease(id, holder, incarnation, absl::Seconds(10));
    if (session == nullptr) {
      ASSERT_EQ(grant.status().code(), StatusCode::kNotFound);
      return;
    }
    const bool alive = !session->holder.empty() && store_->clock().Now() < session->expiry;
    if (alive && session->holder != holder) {
      ASSERT_EQ(grant.status().code(), StatusCode::kAborted);
      return;
    }
    ASSERT_OK(grant);
    if (alive && session->incarnation == incarnation) {
      ASSERT_EQ(grant->lease.fencing_token(), session->fencing_token);
    } else {
      ASSERT_GT(grant->lease.fencing_token(), newest_token_);
      newest_token_ = grant->lease.fencing_token();
    }
    session->holder = holder;
    session->incarnation = incarnation;
    session->fencing_token = grant->lease.fencing_token();
    session->expiry = store_->clock().Now() + absl::Seconds(10);
  }

  void Release(const std::string& id) {
    const v1::Lease lease = AnyLease(id);
    ModelSession* session = Model(id);
    const StatusCode code = catalog().ReleaseLease(lease).code();
    if (session != nullptr && session->holder.empty() && session->fencing_token == lease.fencing_token()) {
      ASSERT_EQ(code, StatusCode::kOk);
      return;
    }
    ASSERT_EQ(code, LeaseCode(lease));
    if (code == StatusCode::kOk) session->holder.clear();
  }

  void Renew() {
    std::vector<v1::Lease> leases;
    std::set<std::string> want_lost;
    for (int i = 0; i < 4; ++i) {
      const v1::Lease lease = AnyLease(absl::StrCat("s", i));
      if (LeaseCode(lease) == StatusCode::kOk) {
        Model(lease.session_id())->expiry = store_->clock().Now() + absl::Seconds(20);
      } else {
        want_lost.insert(lease.session_id());
      }
      leases.push_back(lease);
    }
    ASSERT_OK_AND_ASSIGN(const std::vector<v1::Lease> lost, catalog().RenewLeases(leases, absl::Seconds(20)));
    std::set<std::string> got_lost;
    for (const v1::Lease& lease : lost) got_lost.insert(lease.session_id());
    ASSERT_EQ(got_lost, want_lost);
  }

  void Begin(const std::string& id) {
    const v1::Lease lease = AnyLease(id);
    ModelSession* session = Model(id);
    std::vector<uint32_t> prompt(Below(12));
    for (uint32_t& token : prompt) token = static_cast<uint32_t>(random_());
    NewTurn turn;
    const std::string request_id = absl::StrCat("r", Below(200));
    turn.request_id = request_id;
    turn.token_ids = prompt;
    turn.spec = request_id;
    turn.model_fingerprint = OneIn(20) ? "model-1" : "model-0";
    const auto start = catalog().BeginTurn(lease, turn);
    StatusCode want = LeaseCode(lease);
    if (want == StatusCode::kOk && !session->model.empty() && session->model != turn.model_fingerprint) {
      want = StatusCode::kFailedPrecondition;
    }
    ASSERT_EQ(start.status().code(), want);
    if (want != StatusCode::kOk) return;
    const auto known = std::find_if(session->turns.begin(), session->turns.end(),
                                    [&](const ModelTurn& turn) { return turn.request_id == request_id; });
    ASSERT_EQ(start->existed, known != session->turns.end());
    if (known == session->turns.end()) {
      if (!session->turns.empty() && session->turns.back().open) {
        session->turns.back().open = false;
        session->turns.back().finish_reason = v1::FINISH_REASON_CANCELLED;
      }
      if (session->turns.size() == kTurnsKept) session->turns.pop_front();
      ModelTurn added;
      added.request_id = request_id;
      added.begin = session->tokens.size();
      added.prompt_count = prompt.size();
      session->turns.push_back(added);
      session->tokens.insert(session->tokens.end(), prompt.begin(), prompt.end());
      session->logprobs.resize(session->tokens.size());
      session->model = std::string(turn.model_fingerprint);
    }
    const ModelTurn& want_turn = known == session->turns.end() ? session->turns.back() : *known;
    ASSERT_EQ(start->session_tokens, session->tokens.size());
    ASSERT_EQ(start->turn.begin(), want_turn.begin);
    ASSERT_EQ(start->turn.prompt_count(), want_turn.prompt_count);
    ASSERT_EQ(start->turn.token_count(), want_turn.token_count);
    ASSERT_EQ(start->turn.state() == v1::TURN_STATE_OPEN, want_turn.open);
    ASSERT_EQ(start->turn.finish_reason(), want_turn.finish_reason);
    ASSERT_EQ(start->turn.spec(), request_id);
    const auto logprobs = session->logprobs.begin() + want_turn.begin + want_turn.prompt_count;
    ASSERT_THAT(start->turn.logprobs(),
                testing::ElementsAreArray(logprobs, logprobs + static_cast<int64_t>(want_turn.token_count)));
  }

  void Append() {
    std::set<std::string> ids;
    for (int i = 0; i < 3; ++i) ids.insert(AnyId());
    std::vector<v1::AppendItem> items;
    std::vector<StatusCode> want;
    for (const std::string& id : ids) {
      ModelSession* session = Model(id);
      const v1::Lease lease = AnyLease(id);
      ModelTurn* open = session != nullptr && !session->turns.empty() && session->turns.back().open
                            ? &session->turns.back()
                            : nullptr;
      std::vector<uint32_t> tokens(Below(4));
      for (uint32_t& token : tokens) token = static_cast<uint32_t>(Below(1000));
      const uint64_t length = session == nullptr ? 0 : session->tokens.size();
      const uint64_t expected_length = OneIn(10) ? length + 1 : length;
      const std::string request_id = open == nullptr || OneIn(20) ? "other" : open->request_id;
      const v1::FinishReason finish = OneIn(3) ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_UNSPECIFIED;
      items.push_back(TestAppend(lease, request_id, expected_length, tokens, finish));
      StatusCode code = LeaseCode(lease);
      if (code == StatusCode::kOk && (request_id == "other" || expected_length != length)) code = StatusCode::kAborted;
      want.push_back(code);
      if (code != StatusCode::kOk) continue;
      for (const uint32_t token : tokens) {
        session->tokens.push_back(token);
        session->logprobs.push_back(-static_cast<float>(token));
      }
      open->token_count += tokens.size();
      open->open = finish == v1::FINISH_REASON_UNSPECIFIED;
      open->finish_reason = finish;
    }
    std::vector<const v1::AppendItem*> pointers;
    for (const v1::AppendItem& item : items) pointers.push_back(&item);
    const std::vector<absl::Status> statuses = catalog().AppendTokens(pointers);
    ASSERT_EQ(statuses.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) ASSERT_EQ(statuses[i].code(), want[i]) << statuses[i];
  }

  void Fork(const std::string& id) {
    const std::string new_id = AnyId();
    ModelSession* session = Model(id);
    const uint64_t length = session == nullptr ? 0 : session->tokens.size();
    absl::optional<uint64_t> position;
    if (!OneIn(3)) position = Below(length + 2);
    const auto fork = catalog().ForkSession(id, position, new_id);
    const StatusCode code = fork.status().code();
    if (session == nullptr) {
      ASSERT_EQ(code, StatusCode::kNotFound);
    } else if (Model(new_id) != nullptr) {
      ASSERT_EQ(code, StatusCode::kAlreadyExists);
    } else if (position.value_or(length) > length || position.value_or(length) < session->base.value_or(0)) {
      ASSERT_EQ(code, StatusCode::kOutOfRange);
    } else {
      ASSERT_OK(fork);
      const uint64_t at = position.value_or(length);
      ModelSession copy;
      copy.tokens.assign(session->tokens.begin(), session->tokens.begin() + static_cast<int64_t>(at));
      copy.logprobs.assign(session->logprobs.begin(), session->logprobs.begin() + static_cast<int64_t>(at));
      copy.base = session->base;
      copy.log_begin = session->log_begin;
      if (at > 0 || copy.base.has_value()) copy.model = session->model;
      sessions_[new_id] = std::move(copy);
    }
  }

  void Rewind(const std::string& id) {
    const v1::Lease lease = AnyLease(id);
    ModelSession* session = Model(id);
    const uint64_t position = Below(session == nullptr ? 1 : session->tokens.size() + 2);
    const auto rewound = store_->store().RewindSession(lease, position);
    StatusCode want = LeaseCode(lease);
    if (want == StatusCode::kOk && (position > session->tokens.size() || position < session->base.value_or(0))) {
      want = StatusCode::kOutOfRange;
    }
    ASSERT_EQ(rewound.status().code(), want);
    if (want != StatusCode::kOk) return;
    const auto beyond = [&](const ModelTurn& turn) {
      return turn.begin + turn.prompt_count + turn.token_count > position;
    };
    session->turns.erase(std::remove_if(session->turns.begin(), session->turns.end(), beyond), session->turns.end());
    session->tokens.resize(position);
    session->logprobs.resize(position);
  }

  void Delete(const std::string& id) {
    const v1::Lease lease = AnyLease(id);
    const StatusCode code = store_->store().DeleteSession(lease).code();
    ASSERT_EQ(code, LeaseCode(lease));
    if (code == StatusCode::kOk) sessions_.erase(id);
  }

  void Commit(const std::string& id) {
    const v1::Lease lease = AnyLease(id);
    ModelSession* session = Model(id);
    if (session == nullptr || session->tokens.empty()) return;
    const uint64_t first = session->base.value_or(0) + 1;
    if (session->tokens.size() < first) return;
    v1::SnapshotManifest manifest;
    const std::string snapshot_id = absl::StrCat("x", snapshots_.size());
    manifest.set_snapshot_id(snapshot_id);
    manifest.set_session_id(id);
    manifest.set_position(first + Below(session->tokens.size() + 1 - first));
    manifest.set_model_fingerprint(session->model);
    const std::string data = TestRecordData(static_cast<uint32_t>(snapshots_.size()), 100);
    *manifest.add_records() = TestRecordInfo(snapshot_id, 0, data);
    ASSERT_OK(store_->records().Put(manifest.records(0), data));
    const absl::Status status = store_->store().CommitSnapshot(lease, store_->LogBranch(id), manifest);
    ASSERT_EQ(status.code(), LeaseCode(lease)) << status;
    snapshots_[snapshot_id] = {session->tokens.begin(),
                               session->tokens.begin() + static_cast<int64_t>(manifest.position())};
  }

  void Drop(const std::string& id) {
    ModelSession* session = Model(id);
    if (session == nullptr) return;
    ASSERT_OK_AND_ASSIGN(const auto manifest, catalog().FindSnapshot(id, session->tokens.size(), session->model));
    if (!manifest.has_value()) return;
    const auto dropped = store_->store().DropSnapshot(id, manifest->snapshot_id(), "test");
    if (session->base == manifest->position()) {
      ASSERT_EQ(dropped.status().code(), StatusCode::kFailedPrecondition);
      return;
    }
    ASSERT_THAT(dropped, testing::IsOkAndHolds(true));
    ASSERT_THAT(catalog().HasSnapshot(manifest->snapshot_id()), testing::IsOkAndHolds(false));
  }

  // All that can be seen from outside.
  void Compare() {
    ASSERT_OK_AND_ASSIGN(const SessionPage page, catalog().ListSessions(1000, ""));
    ASSERT_EQ(page.sessions.size(), sessions_.size());
    ASSERT_EQ(catalog().counts().sessions, static_cast<int64_t>(sessions_.size()));
    ASSERT_EQ(catalog().counts().tokens, store_->LogTokens());
    for (const auto& [id, model] : sessions_) {
      ASSERT_OK_AND_ASSIGN(const v1::Session session, catalog().GetSession(id));
      ASSERT_EQ(session.token_count(), model.tokens.size());
      ASSERT_EQ(session.model_fingerprint(), model.model);
      ASSERT_EQ(session.open_request_id(),
                !model.turns.empty() && model.turns.back().open ? model.turns.back().request_id : "");
      ASSERT_EQ(session.has_base_position(), model.base.has_value());
      ASSERT_EQ(session.base_position(), model.base.value_or(0));
      ASSERT_EQ(session.log_begin(), model.log_begin);
      const std::vector<uint32_t> log(model.tokens.begin() + static_cast<int64_t>(model.log_begin), model.tokens.end());
      ASSERT_THAT(store_->Tokens(id), testing::IsOkAndHolds(log)) << id;
      const uint64_t begin = model.log_begin + Below(log.size() + 1);
      const uint64_t end = begin + Below(model.tokens.size() - begin + 1);
      ASSERT_OK_AND_ASSIGN(const TokenPage part, catalog().ReadTokens(id, begin, end));
      ASSERT_TRUE(
          std::equal(part.token_ids.begin(), part.token_ids.end(), model.tokens.begin() + static_cast<int64_t>(begin)));
      // Law S1: a snapshot is of exactly the session's first tokens; and it can be loaded.
      absl::optional<uint64_t> newest;
      for (const uint64_t position : session.snapshot_positions()) {
        ASSERT_TRUE(!newest.has_value() || position > *newest);
        ASSERT_GE(position, model.base.value_or(1));
        newest = position;
        ASSERT_OK_AND_ASSIGN(const auto manifest, catalog().FindSnapshot(id, position, model.model));
        ASSERT_TRUE(manifest.has_value());
        ASSERT_EQ(manifest->position(), position);
        const std::vector<uint32_t>& seen = snapshots_.at(manifest->snapshot_id());
        ASSERT_EQ(seen.size(), position);
        ASSERT_TRUE(std::equal(seen.begin(), seen.end(), model.tokens.begin())) << id << " at " << position;
        ASSERT_OK(store_->records().Get(manifest->records(0)));
      }
      ASSERT_OK_AND_ASSIGN(const auto last, catalog().FindSnapshot(id, UINT64_MAX, model.model));
      ASSERT_EQ(last.has_value() ? absl::make_optional(last->position()) : absl::nullopt, newest);
      if (model.base.has_value()) ASSERT_TRUE(newest.has_value()) << "the base is gone";
    }
    ASSERT_OK(CheckCatalogRows(store_->rows(), kSnapshotsPerBranch));
  }

  std::mt19937 random_;
  const std::unique_ptr<rocksdb::Env> env_;
  std::unique_ptr<TestStore> store_;
  std::map<std::string, ModelSession> sessions_;
  std::map<std::string, std::vector<uint32_t>> snapshots_;  // The tokens that a snapshot has seen.
  uint64_t newest_token_ = 0;
};

TEST_P(CatalogModelTest, StoreAndModelAgree) {
  SCOPED_TRACE(absl::StrCat("seed ", GetParam()));
  const int steps = GetParam() >= kFirstSharedSeed ? 150 : 1000;  // A server takes longer.
  for (int step = 0; step < steps; ++step) {
    SCOPED_TRACE(absl::StrCat("step ", step));
    const std::string id = AnyId();
    const uint64_t operation = Below(100);
    if (operation < 3) {
      Create(id);
    } else if (operation < 6) {
      Import(id);
    } else if (operation < 22) {
      Acquire(id);
    } else if (operation < 25) {
      Release(id);
    } else if (operation < 28) {
      Renew();
    } else if (operation < 42) {
      Begin(id);
    } else if (operation < 62) {
      Append();
    } else if (operation < 70) {
      Fork(id);
    } else if (operation < 76) {
      Rewind(id);
    } else if (operation < 79) {
      Delete(id);
    } else if (operation < 94) {
      Commit(id);
    } else if (operation < 96) {
      Drop(id);
    } else if (operation < 99) {
      store_->clock().Advance(absl::Seconds(5));
    } else {
      ASSERT_OK(store_->Reopen());
    }
    if (HasFatalFailure()) return;
    if (step % 5 == 0) Compare();
    if (HasFatalFailure()) return;
  }
  // When the last session goes, nothing stays.
  for (auto& [id, session] : sessions_) {
    store_->clock().Advance(absl::Minutes(1));
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Acquire(id));
    ASSERT_OK(store_->store().DeleteSession(lease));
    ASSERT_OK(CheckCatalogRows(store_->rows(), kSnapshotsPerBranch));
  }
  EXPECT_THAT(store_->CatalogKeys(), IsEmpty());
  if (GetParam() >= kFirstSharedSeed) return;  // Its objects' ages are by another clock.
  // Of records only those whose commit was refused are left; they are nobody's.
  store_->clock().Advance(absl::Hours(2));
  ASSERT_OK(store_->store().SweepOrphans());
  EXPECT_THAT(store_->RecordKeys(), IsEmpty());
  EXPECT_EQ(store_->records().bytes(), 0);
}

INSTANTIATE_TEST_SUITE_P(Seeds, CatalogModelTest, ::testing::Values(1u, 2u, 3u, 4u, 5u, 6u, 100u));

}  // namespace
}  // namespace rwkv::state_store
