#include "services/state_store/client/crc32c.h"

#include <isa-l/crc.h>

#include <algorithm>

namespace rwkv::state_store {

uint32_t Crc32c(absl::Span<const char> data) { return ExtendCrc32c(0, data); }

uint32_t ExtendCrc32c(uint32_t crc, absl::Span<const char> data) {
  // isa-l leaves the inversion before and after to its caller, and counts bytes in an int.
  constexpr size_t kMaxPiece = size_t{1} << 30;
  uint32_t remainder = ~crc;
  while (!data.empty()) {
    const absl::Span<const char> piece = data.first(std::min(data.size(), kMaxPiece));
    // isa-l only reads; its parameter lacks the const.
    remainder = crc32_iscsi(reinterpret_cast<unsigned char*>(const_cast<char*>(piece.data())),
                            static_cast<int>(piece.size()), remainder);
    data.remove_prefix(piece.size());
  }
  return ~remainder;
}

}  // namespace rwkv::state_store
