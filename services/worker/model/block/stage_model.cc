#include "services/worker/model/block/stage_model.h"

#include <utility>

#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/block/rwkv4_stage.h"
#include "services/worker/model/block/rwkv6_stage.h"
#include "services/worker/model/block/rwkv7_stage.h"

namespace rwkv::worker {

absl::StatusOr<std::unique_ptr<StageModel>> CreateStageModel(std::shared_ptr<const StageWeights> weights,
                                                             kernels::Device& device,
                                                             const StageModelOptions& options) {
  switch (weights->config().version) {
    case checkpoint::ModelVersion::k4:
      return Rwkv4Stage::Create(std::move(weights), device, options);
    case checkpoint::ModelVersion::k5_0:
    case checkpoint::ModelVersion::k5_1:
    case checkpoint::ModelVersion::k5_2:
    case checkpoint::ModelVersion::k6:
      return Rwkv6Stage::Create(std::move(weights), device, options);
    case checkpoint::ModelVersion::k7:
    case checkpoint::ModelVersion::k7a:
    case checkpoint::ModelVersion::k7b:
      return Rwkv7Stage::Create(std::move(weights), device, options);
  }
  return absl::InternalError("no such version");
}

}  // namespace rwkv::worker
