// CRC-32C (Castagnoli; RFC 3720 appendix B.4), the checksum of every state record. "123456789" has 0xE3069283.
#pragma once

#include <cstdint>

#include "absl/types/span.h"

namespace rwkv::state_store {

// Of all of `data`; of nothing it is 0.
uint32_t Crc32c(absl::Span<const char> data);

// Of a message in pieces: ExtendCrc32c(Crc32c(a), b) == Crc32c(a + b).
uint32_t ExtendCrc32c(uint32_t crc, absl::Span<const char> data);

}  // namespace rwkv::state_store
