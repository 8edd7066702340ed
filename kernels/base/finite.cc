#include "kernels/base/finite.h"

#include <algorithm>
#include <cstring>

namespace rwkv::kernels {
namespace {

// An element is NaN or infinite when all bits of its exponent are set. A whole block is tested before anybody looks for
// the culprit, so that the loop has no exit and vectorises.
template <typename Bits>
int64_t Find(const void* data, int64_t count, Bits exponent) {
  constexpr int64_t kBlock = 4096;
  const char* bytes = static_cast<const char*>(data);
  Bits block[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    std::memcpy(block, bytes + start * sizeof(Bits), size * sizeof(Bits));
    Bits found = 0;
    for (int64_t i = 0; i < size; ++i) found |= static_cast<Bits>((block[i] & exponent) == exponent);
    if (found == 0) continue;
    for (int64_t i = 0; i < size; ++i) {
      if ((block[i] & exponent) == exponent) return start + i;
    }
  }
  return -1;
}

}  // namespace

int64_t FindNotFinite(DType dtype, const void* data, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return Find<uint32_t>(data, count, 0x7f800000);
    case DType::kBFloat16:
      return Find<uint16_t>(data, count, 0x7f80);
    case DType::kFloat16:
      return Find<uint16_t>(data, count, 0x7c00);
  }
  return -1;
}

}  // namespace rwkv::kernels
