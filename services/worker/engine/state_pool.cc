#include "services/worker/engine/state_pool.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {
namespace {

// Slots begin at cache lines, so that two of them never share one.
constexpr int64_t kStrideFloats = kernels::kBufferAlignment / static_cast<int64_t>(sizeof(float));

int64_t Bytes(int64_t floats) { return floats * static_cast<int64_t>(sizeof(float)); }

}  // namespace

absl::StatusOr<std::unique_ptr<StatePool>> StatePool::Create(kernels::Device& device, const StageModel& model,
                                                             int slots) {
  if (slots < 1) return absl::InvalidArgumentError(absl::StrCat("state pool: ", slots, " slots"));
  std::unique_ptr<StatePool> pool(new StatePool(model, slots));
  const int64_t state_bytes = model.state_layout().record_bytes() * pool->layers_;
  for (int layer = 0; layer < pool->layers_; ++layer) {
    for (const StateTensorSpec& tensor : model.state_layout().tensors()) {
      const int64_t stride = (tensor.size() + kStrideFloats - 1) / kStrideFloats * kStrideFloats;
      absl::StatusOr<kernels::DeviceArray<float>> buffer = kernels::DeviceArray<float>::Create(device, slots * stride);
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
  RWKV_RETURN_IF_ERROR(pool->UploadInitialState(device));
  return pool;
}

StatePool::StatePool(const StageModel& model, int slots) : model_(model), layers_(model.weights().layers().size()) {
  view_.slots = slots;
  view_.tensors_per_layer = static_cast<int>(model.state_layout().tensors().size());
}

template <typename Visit>
absl::Status StatePool::ForEach(int slot, Visit visit) const {
  int64_t place = 0;
  for (int layer = 0; layer < layers_; ++layer) {
    for (int i = 0; i < view_.tensors_per_layer; ++i) {
      const kernels::StateTensor& pool = view_.tensor(layer, i);
      const int64_t size = model_.state_layout().tensors()[i].size();
      RWKV_RETURN_IF_ERROR(visit(layer, i, pool.data + slot * pool.stride, size, place));
      place += size;
    }
  }
  return absl::OkStatus();
}

absl::Status StatePool::UploadInitialState(kernels::Device& device) {
  bool has_initial = false;
  for (int layer = 0; layer < layers_; ++layer) {
    for (int i = 0; i < view_.tensors_per_layer; ++i) has_initial |= !model_.InitialState(layer, i).empty();
  }
  if (!has_initial) return absl::OkStatus();
  RWKV_ASSIGN_OR_RETURN(initial_, kernels::DeviceArray<float>::Create(device, layers_ * model_.state_layout().size(),
                                                                      kernels::MemoryKind::kPinned));
  return ForEach(0, [this](int layer, int tensor, float*, int64_t, int64_t place) {
    const absl::Span<const float> initial = model_.InitialState(layer, tensor);
    std::copy(initial.begin(), initial.end(), initial_.data() + place);
    return absl::OkStatus();
  });
}

absl::Status StatePool::Reset(int slot, const float* tuned, kernels::Stream& stream) {
  return ForEach(slot, [&](int layer, int tensor, float* state, int64_t size, int64_t place) {
    if (tuned != nullptr && tensor == model_.state_layout().matrix()) {
      return stream.Copy(state, tuned + layer * size, Bytes(size));
    }
    if (model_.InitialState(layer, tensor).empty()) return stream.Zero(state, Bytes(size));
    return stream.Copy(state, initial_.data() + place, Bytes(size));
  });
}

absl::Status StatePool::CopyOut(int slot, float* to, kernels::Stream& stream) const {
  return ForEach(slot, [&](int, int, const float* state, int64_t size, int64_t place) {
    return stream.Copy(to + place, state, Bytes(size));
  });
}

absl::Status StatePool::CopyIn(int slot, const float* from, kernels::Stream& stream) {
  return ForEach(slot, [&](int, int, float* state, int64_t size, int64_t place) {
    return stream.Copy(state, from + place, Bytes(size));
  });
}

}  // namespace rwkv::worker
