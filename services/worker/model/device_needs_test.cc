// Models that a device lacks something for.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/host_device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/weight.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/weights.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

// Has the operations of another device, and gives nothing.
class StingyDevice final : public kernels::HostDevice {
 public:
  explicit StingyDevice(const kernels::OpTable& ops) : ops_(ops) {}
  absl::string_view name() const override { return "stingy"; }
  absl::string_view numeric_family() const override { return "stingy"; }
  const kernels::OpTable& ops() const override { return ops_; }
  absl::StatusOr<kernels::Weight> Load(const kernels::MatrixView&, kernels::WeightUse) override {
    return absl::ResourceExhaustedError("asked for a weight");
  }
  absl::StatusOr<kernels::Buffer> Allocate(int64_t bytes, kernels::MemoryKind) override {
    return absl::ResourceExhaustedError(absl::StrCat("asked for ", bytes, " bytes"));
  }

 private:
  const kernels::OpTable& ops_;
};

absl::Status LoadOn(const kernels::OpTable& ops, ModelVersion version, int head_size, int64_t query_width = 20) {
  rwkv::testing::RandomModelOptions options;
  options.version = version;
  options.layers = 2;
  options.width = 2 * head_size;
  options.head_size = head_size;
  options.vocab_size = 11;
  options.query_width = query_width;
  const std::string path = absl::StrCat(::testing::TempDir(), "/model.safetensors");
  EXPECT_THAT(rwkv::testing::WriteRandomModel(options, path), IsOk());
  const std::shared_ptr<const checkpoint::Checkpoint> checkpoint = *checkpoint::Checkpoint::Open(path);
  StingyDevice device(ops);
  return StageWeights::Load(checkpoint, *checkpoint::ModelConfig::FromCheckpoint(*checkpoint), {0, 2}, device).status();
}

TEST(DeviceNeedsTest, AreSaidBeforeAnythingIsRead) {
  kernels::OpTable ops;  // Nothing is computed.
  ops.max_head_size = 15;
  for (ModelVersion version : {ModelVersion::k5_2, ModelVersion::k6, ModelVersion::k7}) {
    EXPECT_THAT(LoadOn(ops, version, 16),
                StatusIs(absl::StatusCode::kUnimplemented,
                         HasSubstr("stingy: the model's head_size 16 is more than 15, the largest on this device")))
        << Name(version);
  }
  ops.max_head_size = 16;
  EXPECT_THAT(LoadOn(ops, ModelVersion::k7, 16), StatusIs(absl::StatusCode::kResourceExhausted)) << "it fits";
  EXPECT_THAT(LoadOn(ops, ModelVersion::k7b, 16),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("stingy: a model of RWKV-7b needs deep_embed_att")));
}

TEST(DeviceNeedsTest, AGpuHasHeadsOf128AndAttentionOf4032Channels) {
  if (!kernels::cuda::HasEmulatedDevice()) GTEST_SKIP() << "this build has no CUDA headers";
  const std::unique_ptr<kernels::Device> device = *kernels::cuda::OpenEmulatedDevice();
  EXPECT_THAT(LoadOn(device->ops(), ModelVersion::k7, 128), StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(LoadOn(device->ops(), ModelVersion::k7, 136),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_size 136 is more than 128")));
  EXPECT_THAT(LoadOn(device->ops(), ModelVersion::k7b, 16, 4032 - 32), StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(LoadOn(device->ops(), ModelVersion::k7b, 16, 4033 - 32),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("4033 together, are more than 4032")));
  EXPECT_THAT(LoadOn(device->ops(), ModelVersion::k7a, 16, 4033 - 32), StatusIs(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace rwkv::worker
