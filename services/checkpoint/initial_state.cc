#include "services/checkpoint/initial_state.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/dtype.h"
#include "kernels/base/finite.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {
namespace {

std::string StateName(int layer) { return absl::StrCat("blocks.", layer, ".att.time_state"); }

absl::Status CheckAll(const Checkpoint& checkpoint, const ModelConfig& config) {
  if (config.head_count == 0) {
    return absl::FailedPreconditionError("this model has no matrix states, so none can be tuned");
  }
  const std::vector<int64_t> shape = {config.head_count, config.head_size, config.head_size};
  for (int layer = 0; layer < config.layer_count; ++layer) {
    const TensorInfo* info = checkpoint.Find(StateName(layer));
    if (info == nullptr) return absl::InvalidArgumentError(absl::StrCat("there is no ", StateName(layer)));
    if (info->shape != shape || !WeightDType(info->type).has_value()) {
      return absl::InvalidArgumentError(absl::StrCat(StateName(layer), " is ", ElementTypeName(info->type), " ",
                                                     ShapeString(info->shape), "; the model's states are ",
                                                     ShapeString(shape), " of fp32, bf16 or fp16"));
    }
  }
  if (static_cast<int>(checkpoint.tensors().size()) == config.layer_count) return absl::OkStatus();
  for (const TensorInfo& info : checkpoint.tensors()) {
    for (int layer = 0; layer <= config.layer_count; ++layer) {
      if (layer == config.layer_count) {
        return absl::InvalidArgumentError(absl::StrCat(
            "tensor ", Quoted(info.name), " is no tuned state of a model of ", config.layer_count, " layers"));
      }
      if (info.name == StateName(layer)) break;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> LoadState(const Checkpoint& checkpoint, const std::string& name) {
  const TensorInfo& info = *checkpoint.Find(name);
  std::vector<uint8_t> bytes(info.bytes);
  RWKV_RETURN_IF_ERROR(checkpoint.ReadBytes(info, 0, absl::MakeSpan(bytes)));
  std::vector<float> state(info.bytes / ElementSize(info.type));
  kernels::WidenToFloat(*WeightDType(info.type), bytes.data(), static_cast<int64_t>(state.size()), state.data());
  const int64_t bad = kernels::FindNotFinite(kernels::DType::kFloat32, state.data(), state.size());
  if (bad >= 0) return absl::DataLossError(absl::StrCat("element ", bad, " of ", name, " is ", state[bad]));
  return state;
}

absl::StatusOr<std::vector<std::vector<float>>> LoadAll(const Checkpoint& checkpoint, const ModelConfig& config,
                                                        int begin, int end) {
  RWKV_RETURN_IF_ERROR(CheckAll(checkpoint, config));
  std::vector<std::vector<float>> states;
  for (int layer = begin; layer < end; ++layer) {
    RWKV_ASSIGN_OR_RETURN(std::vector<float> state, LoadState(checkpoint, StateName(layer)));
    states.push_back(std::move(state));
  }
  return states;
}

}  // namespace

absl::StatusOr<std::vector<std::vector<float>>> LoadInitialStates(const Checkpoint& checkpoint,
                                                                  const ModelConfig& config, int begin, int end) {
  absl::StatusOr<std::vector<std::vector<float>>> states = LoadAll(checkpoint, config, begin, end);
  if (states.ok()) return states;
  return absl::Status(states.status().code(), absl::StrCat(checkpoint.path(), ": ", states.status().message()));
}

}  // namespace rwkv::checkpoint
