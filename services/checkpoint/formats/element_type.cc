#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {

int64_t ElementSize(ElementType type) {
  switch (type) {
    case ElementType::kFloat64:
    case ElementType::kInt64:
    case ElementType::kUint64:
      return 8;
    case ElementType::kFloat32:
    case ElementType::kInt32:
    case ElementType::kUint32:
      return 4;
    case ElementType::kFloat16:
    case ElementType::kBFloat16:
    case ElementType::kInt16:
    case ElementType::kUint16:
      return 2;
    case ElementType::kFloat8E4M3:
    case ElementType::kFloat8E5M2:
    case ElementType::kInt8:
    case ElementType::kUint8:
    case ElementType::kBool:
      return 1;
  }
  return 1;
}

absl::string_view ElementTypeName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "fp32";
    case ElementType::kFloat16:
      return "fp16";
    case ElementType::kBFloat16:
      return "bf16";
    case ElementType::kFloat64:
      return "fp64";
    case ElementType::kFloat8E4M3:
      return "fp8_e4m3";
    case ElementType::kFloat8E5M2:
      return "fp8_e5m2";
    case ElementType::kInt64:
      return "int64";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt16:
      return "int16";
    case ElementType::kInt8:
      return "int8";
    case ElementType::kUint64:
      return "uint64";
    case ElementType::kUint32:
      return "uint32";
    case ElementType::kUint16:
      return "uint16";
    case ElementType::kUint8:
      return "uint8";
    case ElementType::kBool:
      return "bool";
  }
  return "unknown";
}

absl::optional<kernels::DType> WeightDType(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return kernels::DType::kFloat32;
    case ElementType::kBFloat16:
      return kernels::DType::kBFloat16;
    case ElementType::kFloat16:
      return kernels::DType::kFloat16;
    default:
      return absl::nullopt;
  }
}

}  // namespace rwkv::checkpoint
