#include "services/worker/testing/golden.h"

#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/checkpoint.h"

namespace rwkv::worker {
namespace {

// The elements of a little-endian .npy of 4-byte elements, version 1, C order.
template <typename T>
absl::StatusOr<std::vector<T>> ReadNpy(const std::string& path, const char* type) {
  static_assert(sizeof(T) == 4);
  std::ifstream in(path, std::ios::binary);
  std::stringstream buffer;
  buffer << in.rdbuf();
  const std::string bytes = buffer.str();
  if (!in || bytes.size() < 10 || bytes.compare(0, 6, "\x93NUMPY") != 0 || bytes[6] != 1) {
    return absl::NotFoundError(absl::StrCat(path, ": no .npy version 1"));
  }
  const size_t header = static_cast<unsigned char>(bytes[8]) | static_cast<unsigned char>(bytes[9]) << 8;
  const std::string description = bytes.substr(10, header);
  if (!absl::StrContains(description, type) || !absl::StrContains(description, "'fortran_order': False") ||
      (bytes.size() - 10 - header) % 4 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", description));
  }
  std::vector<T> values((bytes.size() - 10 - header) / 4);
  std::memcpy(values.data(), bytes.data() + 10 + header, values.size() * 4);
  return values;
}

}  // namespace

absl::StatusOr<Golden> ReadGolden(const std::string& stem) {
  Golden golden;
  RWKV_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadNpy<int32_t>(stem + ".tokens.npy", "'<i4'"));
  golden.tokens.assign(tokens.begin(), tokens.end());
  RWKV_ASSIGN_OR_RETURN(golden.logits, ReadNpy<float>(stem + ".logits.npy", "'<f4'"));
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const checkpoint::Checkpoint> state,
                        checkpoint::Checkpoint::Open(stem + ".state.safetensors"));
  for (const checkpoint::TensorInfo& info : state->tensors()) {
    RWKV_ASSIGN_OR_RETURN(const checkpoint::Tensor tensor, state->Read(info.name));
    std::vector<float>& values = golden.state[info.name];
    values.resize(info.bytes / sizeof(float));
    std::memcpy(values.data(), tensor.data, info.bytes);
  }
  return golden;
}

}  // namespace rwkv::worker
