// What a tensor of a checkpoint file is made of.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "kernels/base/dtype.h"

namespace rwkv::checkpoint {

// Everything the formats can hold. Weights must be one of the three that have a kernels::DType; the others are known so
// that a file which carries them beside its weights still opens, and so that an error can say what it found.
enum class ElementType {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kFloat8E4M3,
  kFloat8E5M2,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUint64,
  kUint32,
  kUint16,
  kUint8,
  kBool,
};

int64_t ElementSize(ElementType type);                         // Bytes.
absl::string_view ElementTypeName(ElementType type);           // "fp32", "bf16", "int64", ...
absl::optional<kernels::DType> WeightDType(ElementType type);  // Nothing if no kernel computes with it.

}  // namespace rwkv::checkpoint
