#include "services/worker/engine/state_pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian, copied as they lie in memory");

// Slots begin at cache lines, so that two of them never share one.
constexpr int64_t kStrideFloats = kernels::kBufferAlignment / static_cast<int64_t>(sizeof(float));

bool AllFinite(const float* values, int64_t count) {
  // The exponent is all ones for infinities and NaNs alone; integer work vectorises.
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    found |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return found == 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StatePool>> StatePool::Create(const StageModel& model, int slots) {
  if (slots < 1) return absl::InvalidArgumentError(absl::StrCat("state pool: ", slots, " slots"));
  std::unique_ptr<StatePool> pool(new StatePool(model, slots));
  const int64_t state_bytes = model.state_layout().record_bytes() * pool->layers_;
  for (int layer = 0; layer < pool->layers_; ++layer) {
    for (const StateTensorSpec& tensor : model.state_layout().tensors()) {
      const int64_t stride = (tensor.size() + kStrideFloats - 1) / kStrideFloats * kStrideFloats;
      absl::StatusOr<kernels::AlignedBuffer<float>> buffer = kernels::AlignedBuffer<float>::Create(slots * stride);
      if (!buffer.ok()) {
        return absl::ResourceExhaustedError(
            absl::StrCat("state pool: no memory for ", slots, " slots of ", state_bytes, " bytes"));
      }
      pool->bytes_ += buffer->size_in_bytes();
      pool->pools_.push_back({buffer->data(), stride});
      pool->buffers_.push_back(*std::move(buffer));
    }
  }
  pool->view_.tensors = pool->pools_.data();
  return pool;
}

StatePool::StatePool(const StageModel& model, int slots) : model_(model), layers_(model.weights().layers().size()) {
  view_.slots = slots;
  view_.tensors_per_layer = static_cast<int>(model.state_layout().tensors().size());
}

void StatePool::Reset(int slot, const TunedState* tuned) {
  for (int layer = 0; layer < layers_; ++layer) {
    for (int i = 0; i < view_.tensors_per_layer; ++i) {
      const kernels::StateTensor& pool = view_.tensor(layer, i);
      float* const state = pool.data + slot * pool.stride;
      const bool is_tuned = tuned != nullptr && i == model_.state_layout().matrix();
      const absl::Span<const float> initial = is_tuned ? (*tuned)[layer] : model_.InitialState(layer, i);
      const int64_t size = model_.state_layout().tensors()[i].size();
      if (initial.empty()) {
        std::fill(state, state + size, 0.0f);
      } else {
        std::copy(initial.begin(), initial.end(), state);
      }
    }
  }
}

absl::Status StatePool::CopyOut(int slot, int stage_layer, std::string* record) const {
  record->resize(model_.state_layout().record_bytes());
  char* out = record->data();
  for (int i = 0; i < view_.tensors_per_layer; ++i) {
    const kernels::StateTensor& pool = view_.tensor(stage_layer, i);
    const StateTensorSpec& tensor = model_.state_layout().tensors()[i];
    const float* const state = pool.data + slot * pool.stride;
    if (!AllFinite(state, tensor.size())) {
      return absl::InternalError(absl::StrCat("slot ", slot, ": ", tensor.name, " of layer ",
                                              model_.weights().layers().begin + stage_layer, " is not finite"));
    }
    const int64_t bytes = tensor.size() * static_cast<int64_t>(sizeof(float));
    std::memcpy(out, state, bytes);
    out += bytes;
  }
  return absl::OkStatus();
}

absl::Status StatePool::CopyIn(int slot, int stage_layer, absl::string_view record) {
  const int layer = model_.weights().layers().begin + stage_layer;
  if (static_cast<int64_t>(record.size()) != model_.state_layout().record_bytes()) {
    return absl::DataLossError(absl::StrCat("state record of layer ", layer, " has ", record.size(), " bytes, not ",
                                            model_.state_layout().record_bytes()));
  }
  std::vector<float> values(model_.state_layout().size());
  std::memcpy(values.data(), record.data(), record.size());
  if (!AllFinite(values.data(), model_.state_layout().size())) {
    return absl::DataLossError(absl::StrCat("state record of layer ", layer, " is not finite"));
  }
  const float* in = values.data();
  for (int i = 0; i < view_.tensors_per_layer; ++i) {
    const kernels::StateTensor& pool = view_.tensor(stage_layer, i);
    const int64_t size = model_.state_layout().tensors()[i].size();
    std::copy(in, in + size, pool.data + slot * pool.stride);
    in += size;
  }
  return absl::OkStatus();
}

}  // namespace rwkv::worker
