#include "kernels/base/finite.h"

#include <algorithm>
#include <cstring>

namespace rwkv::kernels {
namespace {

// An element is NaN or infinite when all bits of its exponent are set. A whole block is tested before anybody looks for
// the culprit, so that the loop has no exit and vectorises; line by line, so that lines further on are asked of memory
// meanwhile, across the pages at which the processor itself stops.
template <typename Bits>
int64_t Find(const void* data, int64_t count, Bits exponent) {
  constexpr int64_t kBlock = 4096;
  constexpr int64_t kLine = 64 / sizeof(Bits);
  constexpr int64_t kAhead = 4096;  // Bytes.
  const char* bytes = static_cast<const char*>(data);
  const auto is_finite = [bytes, exponent](int64_t i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    return (bits & exponent) != exponent;
  };
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = std::min(start + kBlock, count);
    Bits found = 0;
    int64_t line = start;
    for (; line + kLine <= end; line += kLine) {
      __builtin_prefetch(bytes + line * static_cast<int64_t>(sizeof(Bits)) + kAhead);  // Faults nowhere.
      for (int64_t i = 0; i < kLine; ++i) found |= static_cast<Bits>(!is_finite(line + i));
    }
    for (; line < end; ++line) found |= static_cast<Bits>(!is_finite(line));
    if (found == 0) continue;
    for (int64_t i = start; i < end; ++i) {
      if (!is_finite(i)) return i;
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
