// What this is, for metrics and for those who ask.
#pragma once

namespace rwkv::common {

inline constexpr char kVersion[] = "0.1-unreleased";  // As deploy/CHANGELOG.md has it.

}  // namespace rwkv::common
