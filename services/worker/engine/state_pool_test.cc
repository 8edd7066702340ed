#include "services/worker/engine/state_pool.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/state_tensor.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "services/worker/engine/state_copy.h"
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
    TestEngineOptions engine;
    engine.device = kProtectedDevice;
    engine_ = *MakeTestEngine(path, 1, 2, engine);  // Layer 2.
    pool_ = *StatePool::Create(engine_->device(), engine_->model(), 3);
    stream_ = *engine_->device().NewStream();
  }

  // A record whose element i is base + i.
  std::string Record(float base) const {
    std::vector<float> values(engine_->model().state_layout().size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = base + static_cast<float>(i);
    return Bytes(values);
  }

  static std::string Bytes(const std::vector<float>& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  }

  absl::Status CopyIn(int slot, const std::string& record) {
    const std::shared_ptr<StateCopy> copy = *engine_->copies().Take();
    if (absl::Status status = Fill(*copy, {record}); !status.ok()) return status;
    return pool_->CopyIn(slot, copy->values(), *stream_);
  }

  absl::StatusOr<std::string> CopyOut(int slot) {
    const std::shared_ptr<StateCopy> copy = *engine_->copies().Take();
    if (absl::Status status = pool_->CopyOut(slot, copy->values(), *stream_); !status.ok()) return status;
    if (absl::Status status = stream_->Record(copy->copied()); !status.ok()) return status;
    const absl::StatusOr<std::vector<absl::Span<const char>>> records = copy->Records(slot);
    if (!records.ok()) return records.status();
    return std::string((*records)[0].data(), (*records)[0].size());
  }

  // One number of a slot's state.
  float At(int slot, int tensor, int64_t element) {
    const kernels::StateTensor& state = pool_->view().tensor(0, tensor);
    const auto pinned = *kernels::DeviceArray<float>::Create(engine_->device(), 1, kernels::MemoryKind::kPinned);
    EXPECT_THAT(stream_->Copy(pinned.data(), state.data + slot * state.stride + element, sizeof(float)), IsOk());
    EXPECT_THAT(stream_->Synchronize(), IsOk());
    return *pinned.data();
  }

  std::unique_ptr<StageEngine> engine_;
  std::unique_ptr<StatePool> pool_;
  std::unique_ptr<kernels::Stream> stream_;
};

TEST_F(StatePoolTest, ARecordHoldsTheTensorsInTheOrderOfTheLayout) {
  EXPECT_EQ(pool_->layers(), 1);
  EXPECT_EQ(engine_->model().state_layout().record_bytes(), (10 + 2 * 5 * 5 + 10) * 4);
  ASSERT_THAT(CopyIn(1, Record(100)), IsOk());
  EXPECT_EQ(At(1, 0, 0), 100);  // att.x_prev[0]
  EXPECT_EQ(At(1, 1, 7), 117);  // att.state[0][1][2]
  EXPECT_EQ(At(1, 2, 9), 169);  // ffn.x_prev[9]
}

TEST_F(StatePoolTest, SlotsDoNotTouchEachOther) {
  for (int slot = 0; slot < 3; ++slot) ASSERT_THAT(CopyIn(slot, Record(1000.0f * slot)), IsOk());
  ASSERT_THAT(pool_->Reset(1, nullptr, *stream_), IsOk());
  for (int slot : {0, 2}) EXPECT_EQ(*CopyOut(slot), Record(1000.0f * slot));
  EXPECT_EQ(*CopyOut(1), std::string(Record(0).size(), '\0'));
}

TEST_F(StatePoolTest, ATunedStateIsTheMatrixAndNothingElse) {
  ASSERT_THAT(CopyIn(1, Record(100)), IsOk());
  const auto tuned = *kernels::DeviceArray<float>::Create(engine_->device(), 2 * 5 * 5, kernels::MemoryKind::kPinned);
  std::fill_n(tuned.data(), tuned.size(), 7.0f);
  ASSERT_THAT(pool_->Reset(1, tuned.data(), *stream_), IsOk());
  std::vector<float> expected(10 + 2 * 5 * 5 + 10, 0.0f);
  std::fill_n(expected.begin() + 10, 2 * 5 * 5, 7.0f);
  EXPECT_EQ(*CopyOut(1), Bytes(expected));
}

TEST_F(StatePoolTest, ARecordThatIsNotFiniteIsDataLoss) {
  const std::shared_ptr<StateCopy> copy = *engine_->copies().Take();
  EXPECT_THAT(Fill(*copy, {Record(1)}), IsOk());
  std::string infinite = Record(2);
  const uint32_t bits = 0x7f800000;
  std::memcpy(&infinite[infinite.size() - 4], &bits, 4);
  EXPECT_THAT(Fill(*copy, {infinite}), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layer 2 is not finite")));
}

TEST_F(StatePoolTest, AStateThatIsNotFiniteGivesNoRecords) {
  ASSERT_THAT(CopyIn(1, Record(1)), IsOk());
  std::vector<float> broken(engine_->model().state_layout().size(), 1.0f);
  broken[10 + 3] = -std::numeric_limits<float>::infinity();
  const std::shared_ptr<StateCopy> copy = *engine_->copies().Take();
  std::copy(broken.begin(), broken.end(), copy->values());
  ASSERT_THAT(pool_->CopyIn(2, copy->values(), *stream_), IsOk());
  EXPECT_THAT(CopyOut(2).status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("slot 2: att.state of layer 2")));
  EXPECT_THAT(CopyOut(1), IsOk());
}

TEST_F(StatePoolTest, EveryLayerOfACopyHasToBeFinite) {
  const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/pool.safetensors");
  const std::unique_ptr<StageEngine> whole = *MakeTestEngine(path, 0, 1, {});
  const auto stream = *whole->device().NewStream();
  const std::shared_ptr<StateCopy> copy = *whole->copies().Take();
  const int layers = whole->model().weights().layers().size();
  const int64_t size = whole->model().state_layout().size();
  ASSERT_GE(layers, 2);
  std::fill_n(copy->values(), layers * size, 1.0f);
  ASSERT_THAT(stream->Record(copy->copied()), IsOk());
  EXPECT_THAT(copy->Records(0), IsOk());
  for (int layer = 0; layer < layers; ++layer) {
    float& value = copy->values()[layer * size + size - 1];
    value = std::numeric_limits<float>::quiet_NaN();
    EXPECT_THAT(copy->Records(0).status(),
                StatusIs(absl::StatusCode::kInternal, HasSubstr(absl::StrCat("of layer ", layer, " is not finite"))));
    value = 1.0f;
  }
}

// A copy that the stream still reads is nobody else's, and one that it has passed is used again.
TEST_F(StatePoolTest, ACopyIsGivenAgainOnceTheStreamHasPassedIt) {
  TestEngineOptions options;
  options.device = kLazyDevice;
  const std::string path = absl::StrCat(std::getenv("TEST_TMPDIR"), "/pool.safetensors");
  const std::unique_ptr<StageEngine> lazy = *MakeTestEngine(path, 1, 2, options);
  const auto stream = *lazy->device().NewStream();
  std::shared_ptr<StateCopy> first = *lazy->copies().Take();
  const float* const memory = first->values();
  ASSERT_THAT(stream->Zero(first->values(), 4), IsOk());
  ASSERT_THAT(stream->Record(first->copied()), IsOk());
  first.reset();
  std::shared_ptr<StateCopy> second = *lazy->copies().Take();
  EXPECT_NE(second->values(), memory);
  ASSERT_THAT(stream->Synchronize(), IsOk());
  EXPECT_EQ((*lazy->copies().Take())->values(), memory);
}

TEST_F(StatePoolTest, APoolHasSlots) {
  EXPECT_THAT(StatePool::Create(engine_->device(), engine_->model(), 0).status(),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace rwkv::worker
