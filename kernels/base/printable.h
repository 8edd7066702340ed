// Text of unknown origin (names in files, names of files) as a log line, a terminal or a proto string can bear it.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::kernels {

// `bytes` with everything escaped as in C ("\n", "\xff") that is no printable UTF-8: control characters, quotes,
// backslashes, and bytes that belong to no character. Valid UTF-8, and one line, whatever comes in.
std::string Printable(absl::string_view bytes);

}  // namespace rwkv::kernels
