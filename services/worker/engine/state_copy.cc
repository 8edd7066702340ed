#include "services/worker/engine/state_copy.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
#include "kernels/base/finite.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian, copied as they lie in memory");

constexpr size_t kMaxFree = 4;  // Kept for the next ones.

bool AllFinite(const float* values, int64_t count) {
  return kernels::FindNotFinite(kernels::DType::kFloat32, values, count) < 0;
}

}  // namespace

StateCopy::StateCopy(const StateLayout& layout, LayerRange layers, kernels::DeviceArray<float> values,
                     std::unique_ptr<kernels::Event> copied)
    : layout_(layout), layers_(layers), values_(std::move(values)), copied_(std::move(copied)) {}

absl::StatusOr<std::vector<absl::Span<const char>>> StateCopy::Records(int slot) const {
  if (absl::Status status = copied_->WaitOnHost(); !status.ok()) {
    return absl::InternalError(absl::StrCat("slot ", slot, ": copying its state: ", status.message()));
  }
  std::vector<absl::Span<const char>> records;
  const float* at = values_.data();
  for (int layer = layers_.begin; layer < layers_.end; ++layer) {
    records.emplace_back(reinterpret_cast<const char*>(at), layout_.record_bytes());
    for (const StateTensorSpec& tensor : layout_.tensors()) {
      if (!AllFinite(at, tensor.size())) {
        return absl::InternalError(
            absl::StrCat("slot ", slot, ": ", tensor.name, " of layer ", layer, " is not finite"));
      }
      at += tensor.size();
    }
  }
  return records;
}

std::vector<absl::Span<char>> StateCopy::Room() {
  std::vector<absl::Span<char>> room;
  for (int i = 0; i < layers_.size(); ++i) {
    room.emplace_back(reinterpret_cast<char*>(values_.data() + i * layout_.size()), layout_.record_bytes());
  }
  return room;
}

absl::Status StateCopy::CheckRoom() const {
  for (int i = 0; i < layers_.size(); ++i) {
    if (!AllFinite(values_.data() + i * layout_.size(), layout_.size())) {
      return absl::DataLossError(absl::StrCat("state record of layer ", layers_.begin + i, " is not finite"));
    }
  }
  return absl::OkStatus();
}

StateCopies::StateCopies(kernels::Device& device, const StateLayout& layout, LayerRange layers)
    : device_(device), layout_(layout), layers_(layers) {}

int64_t StateCopies::bytes() const { return layers_.size() * layout_.record_bytes(); }

absl::StatusOr<std::shared_ptr<StateCopy>> StateCopies::Take() {
  std::unique_ptr<StateCopy> copy;
  {
    absl::MutexLock lock(&mu_);
    // Not one that the stream still reads.
    const auto free =
        std::find_if(free_.begin(), free_.end(), [](const auto& candidate) { return candidate->copied().Done(); });
    if (free != free_.end()) {
      copy = std::move(*free);
      free_.erase(free);
    }
  }
  if (copy == nullptr) {
    RWKV_ASSIGN_OR_RETURN(
        kernels::DeviceArray<float> values,
        kernels::DeviceArray<float>::Create(device_, layers_.size() * layout_.size(), kernels::MemoryKind::kPinned));
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Event> copied, device_.NewEvent());
    copy = std::make_unique<StateCopy>(layout_, layers_, std::move(values), std::move(copied));
  }
  const auto give_back = [self = shared_from_this()](StateCopy* used) {
    self->GiveBack(std::unique_ptr<StateCopy>(used));
  };
  return std::shared_ptr<StateCopy>(copy.release(), give_back);
}

void StateCopies::GiveBack(std::unique_ptr<StateCopy> copy) {
  absl::MutexLock lock(&mu_);
  free_.push_back(std::move(copy));
  for (auto it = free_.begin(); free_.size() > kMaxFree && it != free_.end();) {
    // What the stream still reads must live.
    it = (*it)->copied().Done() ? free_.erase(it) : it + 1;
  }
}

}  // namespace rwkv::worker
