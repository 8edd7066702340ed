// Catalog: the prefix cache.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/catalog/catalog_fixture.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/rows.pb.h"
#include "services/state_store/rows/row_store.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOkAndHolds;
using testing::StatusIs;

constexpr int64_t kRecordBytes = 100;
constexpr int64_t kPrefixBytes = kRecordBytes + 20 * kPrefixTokenBytes;  // Of 20 tokens.

v1::PrefixScope Scope() {
  v1::PrefixScope scope;
  scope.set_tenant("a");
  scope.set_model_fingerprint(kTestModel);
  scope.set_numeric_family("cpu");
  scope.set_initial_state("poet@1");
  return scope;
}

class PrefixTest : public CatalogTest {
 protected:
  // Unique in the S3 that the tests of a process share.
  std::string Id(const std::string& name) { return absl::StrCat(store_.tenant(), "-", name); }

  absl::StatusOr<bool> Put(const std::string& name, const v1::PrefixScope& scope,
                           const std::vector<uint32_t>& token_ids) {
    NewPrefix prefix;
    prefix.scope = scope;
    prefix.token_ids = token_ids;
    prefix.manifest.set_snapshot_id(Id(name));
    prefix.manifest.set_position(token_ids.size());
    prefix.manifest.set_model_fingerprint(scope.model_fingerprint());
    const std::string data = TestRecordData(static_cast<uint32_t>(token_ids.size()), kRecordBytes);
    *prefix.manifest.add_records() = TestRecordInfo(Id(name), 0, data);
    if (absl::Status status = store_.records().Put(prefix.manifest.records(0), data); !status.ok()) return status;
    return store_.store().PutPrefix(prefix);
  }

  // Name of what is found, and where; "" if none.
  std::string FindIn(const v1::PrefixScope& scope, const std::vector<uint32_t>& token_ids) {
    const auto found = store_.store().FindPrefix(scope, token_ids);
    if (!found.ok()) return found.status().ToString();
    if (!found->has_value()) return "";
    EXPECT_OK(store_.records().Get((*found)->records(0)));
    return absl::StrCat((*found)->snapshot_id().substr(store_.tenant().size() + 1), " at ", (*found)->position());
  }
  std::string Find(const std::vector<uint32_t>& token_ids) { return FindIn(Scope(), token_ids); }
};

TEST_P(PrefixTest, TheLongestPrefixIsFoundAndNothingElse) {
  for (const uint32_t end : {20, 30, 40}) {
    EXPECT_THAT(Put(absl::StrCat("p", end), Scope(), Range(0, end)), IsOkAndHolds(true));
  }
  EXPECT_EQ(Find(Range(0, 19)), "");
  EXPECT_EQ(Find(Range(0, 20)), "p20 at 20");
  EXPECT_EQ(Find(Range(0, 39)), "p30 at 30");
  EXPECT_EQ(Find(Range(0, 1000)), "p40 at 40");
  std::vector<uint32_t> other = Range(0, 1000);
  other[35] = 0;
  EXPECT_EQ(Find(other), "p30 at 30");
  other[0] = 7;
  EXPECT_EQ(Find(other), "");
  EXPECT_EQ(Find({1, 2, 3}), "");
}

TEST_P(PrefixTest, AnotherTenantModelFamilyOrTunedStateNeverFindsIt) {
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  ASSERT_EQ(Find(Range(0, 30)), "p at 20");
  const auto edited = [](auto edit) {
    v1::PrefixScope scope = Scope();
    edit(scope);
    return scope;
  };
  const v1::PrefixScope others[] = {
      edited([](v1::PrefixScope& scope) { scope.set_tenant("b"); }),
      edited([](v1::PrefixScope& scope) { scope.clear_tenant(); }),
      edited([](v1::PrefixScope& scope) { scope.set_model_fingerprint("another"); }),
      edited([](v1::PrefixScope& scope) { scope.set_numeric_family("cuda"); }),
      edited([](v1::PrefixScope& scope) { scope.set_initial_state("poet@2"); }),
      edited([](v1::PrefixScope& scope) { scope.clear_initial_state(); }),
  };
  for (const v1::PrefixScope& scope : others) EXPECT_EQ(FindIn(scope, Range(0, 30)), "") << scope.DebugString();
}

// Two contents under one key, as two inputs with the same hashes would have it.
TEST_P(PrefixTest, AnEqualHashIsNoProof) {
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  PrefixRow row;
  {
    ASSERT_OK_AND_ASSIGN(const auto rows, store_.rows().Read());
    ASSERT_OK_AND_ASSIGN(const auto content, rows->Get(PrefixKey(Id("p"))));
    ASSERT_TRUE(row.ParseFromString(*content));
  }
  const auto put = [&](const PrefixRow& changed) -> absl::Status {
    RWKV_ASSIGN_OR_RETURN(const auto rows, store_.rows().Begin({}));
    rows->Put(PrefixKey(Id("p")), changed.SerializeAsString());
    return rows->Commit();
  };
  PrefixRow other = row;
  other.set_token_ids(18, 999);
  ASSERT_OK(put(other));
  EXPECT_EQ(Find(Range(0, 30)), "");
  other = row;
  other.set_tenant("b");
  ASSERT_OK(put(other));
  EXPECT_EQ(Find(Range(0, 30)), "");
  ASSERT_OK(put(row));
  EXPECT_EQ(Find(Range(0, 30)), "p at 20");
}

TEST_P(PrefixTest, OfTwoThatComeAtOnceTheSecondIsLetGo) {
  EXPECT_THAT(Put("p", Scope(), Range(0, 20)), IsOkAndHolds(true));
  EXPECT_THAT(Put("p", Scope(), Range(0, 20)), IsOkAndHolds(false));  // Its answer was lost.
  EXPECT_EQ(Find(Range(0, 30)), "p at 20");
  EXPECT_THAT(Put("q", Scope(), Range(0, 20)), IsOkAndHolds(false));
  EXPECT_EQ(Find(Range(0, 30)), "p at 20");
  EXPECT_EQ(store_.records().bytes(), kRecordBytes);
  EXPECT_EQ(catalog().counts().prefix_bytes, kPrefixBytes);
}

TEST_P(PrefixTest, TheLongestUnusedGoWhenItIsFull) {
  store_.SetPrefixCacheBytes(3 * kPrefixBytes);
  ASSERT_OK(store_.Reopen());
  for (const uint32_t seed : {100, 200, 300}) {
    ASSERT_OK(Put(absl::StrCat("p", seed), Scope(), Range(seed, seed + 20)));
    store_.clock().Advance(absl::Minutes(1));
  }
  EXPECT_EQ(Find(Range(100, 120)), "p100 at 20");  // Used now.
  store_.clock().Advance(absl::Minutes(1));
  ASSERT_OK(Put("p400", Scope(), Range(400, 420)));
  EXPECT_EQ(Find(Range(200, 220)), "");
  EXPECT_EQ(Find(Range(100, 120)), "p100 at 20");
  EXPECT_EQ(Find(Range(300, 320)), "p300 at 20");
  EXPECT_EQ(Find(Range(400, 420)), "p400 at 20");
  EXPECT_EQ(store_.records().bytes(), 3 * kRecordBytes);
  EXPECT_EQ(catalog().counts().prefix_bytes, 3 * kPrefixBytes);
  EXPECT_EQ(catalog().counts().prefix_record_bytes, 3 * kRecordBytes);
  EXPECT_EQ(catalog().counts().prefixes, 3);
  ASSERT_OK(store_.Reopen());
  EXPECT_EQ(catalog().counts().prefix_bytes, 3 * kPrefixBytes);
}

TEST_P(PrefixTest, WithoutAnyRoomThereIsNone) {
  store_.SetPrefixCacheBytes(kPrefixBytes - 1);
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(Put("p", Scope(), Range(0, 20)), StatusIs(StatusCode::kResourceExhausted, HasSubstr("prefix_cache")));
  EXPECT_EQ(Find(Range(0, 20)), "");

  store_.SetPrefixCacheBytes(0);
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(Put("q", Scope(), Range(0, 20)), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("prefix_cache")));
  EXPECT_THAT(store_.store().FindPrefix(Scope(), Range(0, 20)).status(), StatusIs(StatusCode::kFailedPrecondition));
}

// A smaller bound takes effect when the store starts again, and its sweep comes round.
TEST_P(PrefixTest, WhatASmallerBoundDoesNotAllowGoesWithTheNextSweep) {
  for (const uint32_t seed : {100, 200}) {
    ASSERT_OK(Put(absl::StrCat("p", seed), Scope(), Range(seed, seed + 20)));
    store_.clock().Advance(absl::Minutes(1));
  }
  store_.SetPrefixCacheBytes(0);
  ASSERT_OK(store_.Reopen());
  EXPECT_EQ(catalog().counts().prefixes, 2);
  ASSERT_OK(store_.store().SweepSessions());
  EXPECT_EQ(catalog().counts().prefixes, 0);
}

TEST_P(PrefixTest, TheSweepOfOrphansLeavesThemAndTakesWhatWasDropped) {
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  ASSERT_OK(Put("q", Scope(), Range(0, 25)));
  store_.clock().Advance(absl::Hours(2));
  ASSERT_OK(store_.store().SweepOrphans());
  EXPECT_EQ(Find(Range(0, 30)), "q at 25");
  ASSERT_OK(store_.store().DropPrefix(Id("q"), "unreadable"));
  ASSERT_OK(store_.store().DropPrefix(Id("q"), "unreadable"));
  EXPECT_EQ(Find(Range(0, 30)), "p at 20");
  EXPECT_EQ(store_.records().bytes(), kRecordBytes);
}

TEST_P(PrefixTest, TheyCountToNoSessionAndNoBoundOfSessions) {
  ASSERT_OK(store_.Create("a@s"));
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  ASSERT_OK_AND_ASSIGN(const TenantUsage usage, catalog().GetUsage("a"));
  EXPECT_EQ(usage.snapshot_bytes, 0);
  EXPECT_EQ(catalog().counts().snapshots, 0);
}

// A record that is gone is a miss once somebody has noticed, and rows that cannot be read never keep a store from
// starting.
TEST_P(PrefixTest, DamagedRowsAreForgotten) {
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  {
    ASSERT_OK_AND_ASSIGN(const auto rows, store_.rows().Begin({}));
    rows->Put(PrefixUseKey(1, Id("p")), "nonsense");
    ASSERT_OK(rows->Commit());
  }
  ASSERT_OK(store_.Reopen());
  EXPECT_EQ(Find(Range(0, 30)), "");
  EXPECT_EQ(catalog().counts().prefixes, 0);
  EXPECT_THAT(Put("q", Scope(), Range(0, 20)), IsOkAndHolds(true));
  EXPECT_EQ(Find(Range(0, 30)), "q at 20");
}

// One whose record is gone, or whose row is damaged, keeps nobody from its place, and leaves nothing behind.
TEST_P(PrefixTest, WhatIsLostMakesRoomForWhatIsReadAgain) {
  const auto expect_only = [this](const std::string& name) {
    EXPECT_EQ(Find(Range(0, 30)), name + " at 20");
    EXPECT_EQ(catalog().counts().prefixes, 1);
    EXPECT_EQ(catalog().counts().prefix_bytes, kPrefixBytes);
    EXPECT_EQ(store_.records().bytes(), kRecordBytes);
    ASSERT_OK_AND_ASSIGN(const auto rows, store_.rows().Read());
    int count = 0;
    ASSERT_OK(rows->Scan("c", "d", [&](absl::string_view key, absl::string_view) -> absl::StatusOr<bool> {
      EXPECT_EQ(key, PrefixKey(Id(name)));
      return ++count < 10;
    }));
    EXPECT_EQ(count, 1);
  };
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  ASSERT_OK(store_.records().Delete(Id("p")));
  EXPECT_THAT(Put("q", Scope(), Range(0, 20)), IsOkAndHolds(true));
  expect_only("q");
  {
    ASSERT_OK_AND_ASSIGN(const auto rows, store_.rows().Begin({}));
    rows->Put(PrefixKey(Id("q")), "nonsense");
    ASSERT_OK(rows->Commit());
  }
  EXPECT_EQ(Find(Range(0, 30)), "");
  EXPECT_THAT(Put("r", Scope(), Range(0, 20)), IsOkAndHolds(true));
  expect_only("r");
  ASSERT_OK(store_.store().SweepSessions());
  expect_only("r");
}

// What was used in a time that is still to come is no younger than what is used now, for good.
TEST_P(PrefixTest, AClockThatIsSetBackKeepsNothingForEver) {
  store_.SetPrefixCacheBytes(3 * kPrefixBytes);
  ASSERT_OK(store_.Reopen());
  store_.clock().Advance(absl::Hours(24 * 365));
  for (const uint32_t seed : {100, 200, 300}) ASSERT_OK(Put(absl::StrCat("p", seed), Scope(), Range(seed, seed + 20)));
  store_.clock().Advance(-absl::Hours(24 * 365));
  ASSERT_OK(store_.store().SweepSessions());
  store_.clock().Advance(absl::Minutes(1));
  EXPECT_EQ(Find(Range(100, 120)), "p100 at 20");
  EXPECT_EQ(Find(Range(200, 220)), "p200 at 20");
  store_.clock().Advance(absl::Minutes(1));
  ASSERT_OK(Put("p400", Scope(), Range(400, 420)));
  EXPECT_EQ(Find(Range(300, 320)), "");
  for (const uint32_t seed : {100, 200, 400}) {
    EXPECT_EQ(Find(Range(seed, seed + 20)), absl::StrCat("p", seed, " at 20"));
  }
  // The same without a sweep in between: who is used is used now.
  store_.clock().Advance(-absl::Hours(24));
  EXPECT_EQ(Find(Range(100, 120)), "p100 at 20");
  ASSERT_OK_AND_ASSIGN(const auto rows, store_.rows().Read());
  EXPECT_THAT(rows->Get(PrefixUseKey(absl::ToUnixSeconds(store_.clock().Now()) / 60, Id("p100"))),
              IsOkAndHolds(testing::Ne(absl::nullopt)));
}

// Two stores, one a little behind: it takes nothing back from the other's uses, and writes nothing for each of its own.
TEST_P(PrefixTest, AClockThatIsALittleBehindChangesNothing) {
  ASSERT_OK(Put("p", Scope(), Range(0, 20)));
  const std::string key = PrefixUseKey(absl::ToUnixSeconds(store_.clock().Now()) / 60, Id("p"));
  store_.clock().Advance(-absl::Minutes(5));
  EXPECT_EQ(Find(Range(0, 20)), "p at 20");
  ASSERT_OK(store_.store().SweepSessions());
  ASSERT_OK_AND_ASSIGN(const auto rows, store_.rows().Read());
  EXPECT_THAT(rows->Get(key), IsOkAndHolds(testing::Ne(absl::nullopt)));
}

TEST_P(PrefixTest, ARecordThatIsNotThereIsNoPrefix) {
  NewPrefix prefix;
  const std::vector<uint32_t> tokens = Range(0, 20);
  prefix.scope = Scope();
  prefix.token_ids = tokens;
  prefix.manifest.set_snapshot_id(Id("gone"));
  prefix.manifest.set_position(20);
  *prefix.manifest.add_records() = TestRecordInfo(Id("gone"), 0, "some bytes");
  EXPECT_THAT(store_.store().PutPrefix(prefix), StatusIs(StatusCode::kDataLoss));
  EXPECT_EQ(Find(tokens), "");
}

INSTANTIATE_TEST_SUITE_P(Engines, PrefixTest, ::testing::Bool(), EngineName);

}  // namespace
}  // namespace rwkv::state_store
