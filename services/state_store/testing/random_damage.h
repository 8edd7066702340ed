// Damage to a file's bytes, at random.
#pragma once

#include <algorithm>
#include <cstddef>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"

namespace rwkv::state_store {

// A bit flipped, the end cut off, or up to 4,096 bytes zeroed; in words. `bytes` is not empty.
inline std::string DamageAtRandom(std::string& bytes, std::mt19937& random) {
  const size_t at = random() % bytes.size();
  switch (random() % 3) {
    case 0:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
      return absl::StrCat("a bit flipped at ", at);
    case 1:
      bytes.resize(at);
      return absl::StrCat("cut at ", at);
    default: {
      const size_t count = std::min<size_t>(bytes.size() - at, 1 + random() % 4096);
      std::fill_n(bytes.begin() + at, count, '\0');
      return absl::StrCat(count, " bytes zeroed at ", at);
    }
  }
}

}  // namespace rwkv::state_store
