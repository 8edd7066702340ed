#include "services/worker/engine/kept_states.h"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;

class KeptStatesTest : public ::testing::Test {
 protected:
  KeptStatesTest() {
    const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/kept.safetensors");
    EXPECT_THAT(rwkv::testing::WriteRandomModel({}, path), IsOk());
    engine_ = *MakeTestEngine(path, 0, 1, {});
  }

  std::shared_ptr<StateCopy> Copy() { return *engine_->copies().Take(); }

  static std::vector<v1::RecordInfo> Records(const std::string& id, uint32_t crc = 7) {
    std::vector<v1::RecordInfo> records(2);
    for (int layer = 0; layer < 2; ++layer) {
      records[layer].set_snapshot_id(id);
      records[layer].set_layer(layer);
      records[layer].set_bytes(100);
      records[layer].set_crc32c(crc);
    }
    return records;
  }

  const std::unique_ptr<common::Metrics> registry_ = *common::Metrics::Create("");
  WorkerMetrics metrics_{*registry_};
  std::unique_ptr<StageEngine> engine_;
};

TEST_F(KeptStatesTest, GivesWhatWasPutUnderTheSameRecordsAlone) {
  KeptStates kept(1000, &metrics_);
  const std::shared_ptr<StateCopy> state = Copy();
  kept.Put(Records("a"), state, 200);
  EXPECT_EQ(kept.Find(Records("a")), state);
  EXPECT_EQ(kept.Find(Records("b")), nullptr);
  EXPECT_EQ(kept.Find(Records("a", 8)), nullptr);  // Other bytes under the same name.
  std::vector<v1::RecordInfo> fewer = Records("a");
  fewer.pop_back();
  EXPECT_EQ(kept.Find(fewer), nullptr);
  EXPECT_EQ(metrics_.kept_state_hits.Value(), 1);
  EXPECT_EQ(metrics_.kept_state_misses.Value(), 3);
}

TEST_F(KeptStatesTest, TheLongestUnusedGoesAndItsMemoryWithIt) {
  KeptStates kept(500, &metrics_);
  std::weak_ptr<StateCopy> b;
  for (const char* const id : {"a", "b"}) {
    const std::shared_ptr<StateCopy> state = Copy();
    kept.Put(Records(id), state, 200);
    if (*id == 'b') b = state;
  }
  EXPECT_NE(kept.Find(Records("a")), nullptr);
  kept.Put(Records("c"), Copy(), 200);
  EXPECT_EQ(kept.Find(Records("b")), nullptr);
  EXPECT_TRUE(b.expired());
  EXPECT_NE(kept.Find(Records("a")), nullptr);
  EXPECT_NE(kept.Find(Records("c")), nullptr);
  EXPECT_EQ(metrics_.kept_state_bytes.Value(), 400);
}

TEST_F(KeptStatesTest, NothingLargerThanAllOfItIsKept) {
  KeptStates kept(150, &metrics_);
  kept.Put(Records("a"), Copy(), 200);
  EXPECT_EQ(kept.Find(Records("a")), nullptr);
  EXPECT_EQ(metrics_.kept_state_bytes.Value(), 0);
}

}  // namespace
}  // namespace rwkv::worker
