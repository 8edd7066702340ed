// Which tensors a layer's state consists of, and where the state pool keeps them. The same for every layer of a model.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/api/state_tensor.h"

namespace rwkv::worker {

struct StateTensorSpec {
  std::string name;  // Without the layer: "att.x_prev".
  std::vector<int64_t> shape;

  int64_t size() const {  // fp32 elements
    int64_t product = 1;
    for (int64_t dimension : shape) product *= dimension;
    return product;
  }
};

// In the order of a state record, which holds the tensors one after the other as fp32, little-endian, without gaps.
class StateLayout {
 public:
  StateLayout() = default;
  explicit StateLayout(std::vector<StateTensorSpec> tensors) : tensors_(std::move(tensors)) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      size_ += tensors_[i].size();
      if (tensors_[i].name == "att.state") matrix_ = static_cast<int>(i);
    }
  }

  const std::vector<StateTensorSpec>& tensors() const { return tensors_; }
  int matrix() const { return matrix_; }  // Index of the wkv state [H, N(value), N(key)]; -1: there is none (RWKV-4).
  int64_t size() const { return size_; }  // fp32 elements of a layer
  int64_t record_bytes() const { return size_ * static_cast<int64_t>(sizeof(float)); }  // of a layer

 private:
  std::vector<StateTensorSpec> tensors_;
  int64_t size_ = 0;
  int matrix_ = -1;
};

// The pool as a block sees it. Borrowed from the pool.
struct StateView {
  int64_t slots = 0;
  int tensors_per_layer = 0;
  const kernels::StateTensor* tensors = nullptr;  // [layers of the stage, tensors_per_layer]

  const kernels::StateTensor& tensor(int stage_layer, int index) const {
    return tensors[stage_layer * tensors_per_layer + index];
  }
};

}  // namespace rwkv::worker
