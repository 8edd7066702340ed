#include "tests/testing/files.h"

#include <fstream>
#include <iterator>

namespace rwkv::testing {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace rwkv::testing
