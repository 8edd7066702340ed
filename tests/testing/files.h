// Small files of tests.
#pragma once

#include <string>

namespace rwkv::testing {

// What the file holds; empty if there is none.
std::string ReadFile(const std::string& path);

}  // namespace rwkv::testing
