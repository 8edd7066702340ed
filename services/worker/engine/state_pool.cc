#include "services/worker/engine/state_pool.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/api/op_table.h"
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
  std::unique_ptr<StatePool> pool(new StatePool(model, device.ops().cast_state, slots));
  const int64_t state_bytes = model.state_layout().record_bytes() * pool->layers_;
  for (int layer = 0; layer < pool->layers_; ++layer) {
    for (int i = 0; i < pool->view_.tensors_per_layer; ++i) {
      const bool is_half = pool->cast_ != nullptr && i == model.state_layout().matrix();
      const int64_t alignment = is_half ? 2 * kStrideFloats : kStrideFloats;
      const int64_t stride = (model.state_layout().tensors()[i].size() + alignment - 1) / alignment * alignment;
      absl::StatusOr<kernels::DeviceArray<float>> buffer =
          kernels::DeviceArray<float>::Create(device, slots * stride / (is_half ? 2 : 1));
      if (!buffer.ok()) {
        return absl::ResourceExhaustedError(
            absl::StrCat("state pool: no memory for ", slots, " slots of ", state_bytes, " bytes"));
      }
      pool->bytes_ += buffer->size_in_bytes();
      pool->pools_.push_back({buffer->data(), stride, is_half});
      pool->buffers_.push_back(*std::move(buffer));
    }
  }
  pool->view_.tensors = pool->pools_.data();
  RWKV_RETURN_IF_ERROR(pool->UploadInitialState(device));
  return pool;
}

StatePool::StatePool(const StageModel& model, kernels::CastStateOp* cast, int slots)
    : model_(model), cast_(cast), layers_(model.weights().layers().size()) {
  view_.slots = slots;
  view_.tensors_per_layer = static_cast<int>(model.state_layout().tensors().size());
}

template <typename Visit>
absl::Status StatePool::ForEach(Visit visit) const {
  int64_t place = 0;
  for (int layer = 0; layer < layers_; ++layer) {
    for (int i = 0; i < view_.tensors_per_layer; ++i) {
      const int64_t size = model_.state_layout().tensors()[i].size();
      RWKV_RETURN_IF_ERROR(visit(layer, i, view_.tensor(layer, i), size, place));
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
  return ForEach([this](int layer, int tensor, const kernels::StateTensor&, int64_t, int64_t place) {
    const absl::Span<const float> initial = model_.InitialState(layer, tensor);
    std::copy(initial.begin(), initial.end(), initial_.data() + place);
    return absl::OkStatus();
  });
}

absl::Status StatePool::Read(const kernels::StateTensor& pool, int slot, float* to, int64_t size,
                             kernels::Stream& stream) const {
  if (!pool.is_half) return stream.Copy(to, pool.of(slot), Bytes(size));
  return cast_({size, /*widens=*/true, to, pool.halves_of(slot)}, stream);
}

absl::Status StatePool::Write(const kernels::StateTensor& pool, int slot, const float* from, int64_t size,
                              kernels::Stream& stream) const {
  if (!pool.is_half) return stream.Copy(pool.of(slot), from, Bytes(size));
  return cast_({size, /*widens=*/false, const_cast<float*>(from), pool.halves_of(slot)}, stream);
}

absl::Status StatePool::Reset(int slot, const float* tuned, kernels::Stream& stream) {
  return ForEach([&](int layer, int tensor, const kernels::StateTensor& pool, int64_t size, int64_t place) {
    if (tuned != nullptr && tensor == model_.state_layout().matrix()) {
      return Write(pool, slot, tuned + layer * size, size, stream);
    }
    if (!model_.InitialState(layer, tensor).empty()) return Write(pool, slot, initial_.data() + place, size, stream);
    if (!pool.is_half) return stream.Zero(pool.of(slot), Bytes(size));
    return stream.Zero(pool.halves_of(slot), size * static_cast<int64_t>(sizeof(uint16_t)));
  });
}

absl::Status StatePool::CopyOut(int slot, float* to, kernels::Stream& stream) const {
  return ForEach([&](int, int, const kernels::StateTensor& pool, int64_t size, int64_t place) {
    return Read(pool, slot, to + place, size, stream);
  });
}

absl::Status StatePool::CopyIn(int slot, const float* from, kernels::Stream& stream) {
  return ForEach([&](int, int, const kernels::StateTensor& pool, int64_t size, int64_t place) {
    return Write(pool, slot, from + place, size, stream);
  });
}

absl::Status StatePool::CopyLastMatrix(int slot, float* to, kernels::Stream& stream) const {
  const StateLayout& layout = model_.state_layout();
  return Read(view_.tensor(layers_ - 1, layout.matrix()), slot, to, layout.tensors()[layout.matrix()].size(), stream);
}

}  // namespace rwkv::worker
