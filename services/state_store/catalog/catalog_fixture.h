// The catalog's rules, tested over every engine: embedded, and shared (a real PostgreSQL; records in an S3).
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {

inline std::vector<uint32_t> Range(uint32_t begin, uint32_t end) {
  std::vector<uint32_t> tokens(end - begin);
  std::iota(tokens.begin(), tokens.end(), begin);
  return tokens;
}

inline NewTurn Turn(absl::string_view request_id, absl::Span<const uint32_t> token_ids,
                    absl::string_view model = kTestModel) {
  NewTurn turn;
  turn.request_id = request_id;
  turn.token_ids = token_ids;
  turn.spec = "spec";
  turn.model_fingerprint = model;
  return turn;
}

// The parameter: whether the store is shared.
class CatalogTest : public ::testing::TestWithParam<bool> {
 protected:
  CatalogTest() : store_(Options(GetParam())) {}
  ~CatalogTest() override { EXPECT_OK(CheckCatalogRows(store_.rows(), 8)); }

  Catalog& catalog() { return store_.catalog(); }
  std::vector<uint64_t> SnapshotPositions(const std::string& session_id) {
    const absl::StatusOr<v1::Session> session = catalog().GetSession(session_id);
    if (!session.ok()) return {};
    return {session->snapshot_positions().begin(), session->snapshot_positions().end()};
  }
  // Id of the newest at or before, "" if none, or the error.
  std::string Find(const std::string& session_id, uint64_t at_or_before, const std::string& model = kTestModel) {
    const auto manifest = catalog().FindSnapshot(session_id, at_or_before, model);
    if (!manifest.ok()) return manifest.status().ToString();
    return manifest->has_value() ? (*manifest)->snapshot_id() : "";
  }

  static TestStore::Options Options(bool shared) {
    TestStore::Options options;
    options.shared = shared;
    return options;
  }

  TestStore store_;
};

inline std::string EngineName(const ::testing::TestParamInfo<bool>& shared) {
  return shared.param ? "Shared" : "Embedded";
}

}  // namespace rwkv::state_store
