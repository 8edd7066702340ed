#include "services/worker/engine/state_pool.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/worker/model/tuned_states.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class StatePoolTest : public ::testing::Test {
 protected:
  StatePoolTest() {
    const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/pool.safetensors");
    rwkv::testing::RandomModelOptions options;
    options.layers = 3;
    options.width = 10;  // Slots need padding to whole cache lines.
    options.head_size = 5;
    options.vocab_size = 7;
    EXPECT_THAT(rwkv::testing::WriteRandomModel(options, path), IsOk());
    engine_ = *MakeTestEngine(path, 1, 2, {});  // Layer 2.
    pool_ = *StatePool::Create(engine_->model(), 3);
  }

  // A record whose element i is base + i.
  std::string Record(float base) const {
    std::vector<float> values(engine_->model().state_layout().size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = base + static_cast<float>(i);
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  }

  std::unique_ptr<StageEngine> engine_;
  std::unique_ptr<StatePool> pool_;
};

TEST_F(StatePoolTest, ARecordHoldsTheTensorsInTheOrderOfTheLayout) {
  EXPECT_EQ(pool_->layers(), 1);
  EXPECT_EQ(engine_->model().state_layout().record_bytes(), (10 + 2 * 5 * 5 + 10) * 4);
  ASSERT_THAT(pool_->CopyIn(1, 0, Record(100)), IsOk());
  const StateView& view = pool_->view();
  EXPECT_EQ(view.tensor(0, 0).data[view.tensor(0, 0).stride + 0], 100);  // att.x_prev[0]
  EXPECT_EQ(view.tensor(0, 1).data[view.tensor(0, 1).stride + 7], 117);  // att.state[0][1][2]
  EXPECT_EQ(view.tensor(0, 2).data[view.tensor(0, 2).stride + 9], 169);  // ffn.x_prev[9]
}

TEST_F(StatePoolTest, SlotsDoNotTouchEachOther) {
  for (int slot = 0; slot < 3; ++slot) ASSERT_THAT(pool_->CopyIn(slot, 0, Record(1000.0f * slot)), IsOk());
  pool_->Reset(1);
  std::string record;
  for (int slot : {0, 2}) {
    ASSERT_THAT(pool_->CopyOut(slot, 0, &record), IsOk());
    EXPECT_EQ(record, Record(1000.0f * slot));
  }
  ASSERT_THAT(pool_->CopyOut(1, 0, &record), IsOk());
  EXPECT_EQ(record, std::string(record.size(), '\0'));
}

TEST_F(StatePoolTest, ATunedStateIsTheMatrixAndNothingElse) {
  ASSERT_THAT(pool_->CopyIn(1, 0, Record(100)), IsOk());
  const TunedState tuned = {std::vector<float>(2 * 5 * 5, 7.0f)};
  pool_->Reset(1, &tuned);
  std::vector<float> expected(10 + 2 * 5 * 5 + 10, 0.0f);
  std::fill_n(expected.begin() + 10, 2 * 5 * 5, 7.0f);
  std::string record;
  ASSERT_THAT(pool_->CopyOut(1, 0, &record), IsOk());
  EXPECT_EQ(record, std::string(reinterpret_cast<const char*>(expected.data()), expected.size() * sizeof(float)));
}

TEST_F(StatePoolTest, ARecordThatDoesNotFitChangesNothing) {
  ASSERT_THAT(pool_->CopyIn(0, 0, Record(1)), IsOk());
  for (const std::string& bad : {std::string(), Record(2).substr(1), Record(2) + "x"}) {
    EXPECT_THAT(pool_->CopyIn(0, 0, bad), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layer 2")));
  }
  std::string infinite = Record(2);
  const uint32_t bits = 0x7f800000;
  std::memcpy(&infinite[infinite.size() - 4], &bits, 4);
  EXPECT_THAT(pool_->CopyIn(0, 0, infinite), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not finite")));
  std::string record;
  ASSERT_THAT(pool_->CopyOut(0, 0, &record), IsOk());
  EXPECT_EQ(record, Record(1));
}

TEST_F(StatePoolTest, AStateThatIsNotFiniteIsNotCopiedOut) {
  const kernels::StateTensor& wkv = pool_->view().tensor(0, 1);
  wkv.data[2 * wkv.stride + 3] = -std::numeric_limits<float>::infinity();
  std::string record;
  EXPECT_THAT(pool_->CopyOut(2, 0, &record),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("slot 2: att.state of layer 2")));
  EXPECT_THAT(pool_->CopyOut(1, 0, &record), IsOk());
}

TEST_F(StatePoolTest, APoolHasSlots) {
  EXPECT_THAT(StatePool::Create(engine_->model(), 0).status(), StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace rwkv::worker
