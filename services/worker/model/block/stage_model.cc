#include "services/worker/model/block/stage_model.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/worker/model/block/rwkv7_stage.h"

namespace rwkv::worker {

absl::StatusOr<std::unique_ptr<StageModel>> CreateStageModel(std::shared_ptr<const StageWeights> weights,
                                                             const kernels::OpTable& ops, int64_t max_rows) {
  switch (weights->config().version) {
    case 7:
      return Rwkv7Stage::Create(std::move(weights), ops, max_rows);
    default:
      return absl::UnimplementedError(absl::StrCat("no block for RWKV-", weights->config().version));
  }
}

}  // namespace rwkv::worker
