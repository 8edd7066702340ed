// Where a format's reader found a tensor.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "services/worker/model/formats/element_type.h"

namespace rwkv::worker {

// A reader hands out records only after it has checked them against the file: every element they reach lies inside it.
struct TensorRecord {
  std::string name;
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;    // Each >= 0.
  std::vector<int64_t> strides;  // In elements, each >= 0, as many as shape; empty: row-major.
  int64_t offset = 0;            // Bytes from the start of the file to element [0, 0, ...].
};

}  // namespace rwkv::worker
