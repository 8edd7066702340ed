// How a row's value is stored: the value, then the CRC32C of key and value, 4 bytes, little-endian.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/state_store/client/crc32c.h"

namespace rwkv::state_store {

inline uint32_t RowChecksum(absl::string_view key, absl::string_view value) {
  return ExtendCrc32c(Crc32c(absl::MakeConstSpan(key.data(), key.size())),
                      absl::MakeConstSpan(value.data(), value.size()));
}

inline std::string SealValue(absl::string_view key, absl::string_view value) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "checksums are little-endian");
  const uint32_t checksum = RowChecksum(key, value);
  std::string sealed;
  sealed.reserve(value.size() + sizeof(checksum));
  sealed.append(value.data(), value.size());
  sealed.append(reinterpret_cast<const char*>(&checksum), sizeof(checksum));
  return sealed;
}

// The checksum that a sealed value ends with; 0 of what is no sealed value.
inline uint32_t SealOf(absl::string_view sealed) {
  uint32_t checksum = 0;
  if (sealed.size() >= sizeof(checksum)) {
    std::memcpy(&checksum, sealed.data() + sealed.size() - sizeof(checksum), sizeof(checksum));
  }
  return checksum;
}

// nullopt: not what was sealed under this key.
inline absl::optional<absl::string_view> OpenValue(absl::string_view key, absl::string_view sealed) {
  if (sealed.size() < sizeof(uint32_t)) return absl::nullopt;
  const absl::string_view value = sealed.substr(0, sealed.size() - sizeof(uint32_t));
  if (SealOf(sealed) != RowChecksum(key, value)) return absl::nullopt;
  return value;
}

// A key in words: what cannot be printed as %XX.
inline std::string PrintableKey(absl::string_view key) {
  std::string printable;
  for (const char c : key.substr(0, 160)) {
    if (c >= 0x21 && c <= 0x7e) {
      printable.push_back(c);
    } else {
      absl::StrAppend(&printable, "%", absl::Hex(static_cast<uint8_t>(c), absl::kZeroPad2));
    }
  }
  return printable;
}

}  // namespace rwkv::state_store
