// Numbers in keys and small rows: 8 bytes, big-endian, so that they sort as numbers do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::state_store {

inline void AppendNumber(std::string& bytes, uint64_t number) {
  for (int shift = 56; shift >= 0; shift -= 8) bytes.push_back(static_cast<char>(number >> shift));
}

// `bytes` has 8 more from `offset` on.
inline uint64_t NumberAt(absl::string_view bytes, size_t offset) {
  uint64_t number = 0;
  for (size_t i = 0; i < 8; ++i) number = number << 8 | static_cast<uint8_t>(bytes[offset + i]);
  return number;
}

}  // namespace rwkv::state_store
