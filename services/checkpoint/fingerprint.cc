#include "services/checkpoint/fingerprint.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "xxhash.h"

namespace rwkv::checkpoint {
namespace {

constexpr int64_t kWholeBytes = 1 << 20;  // Tensors up to this size are hashed whole.
constexpr int64_t kWindows = 16;
constexpr int64_t kWindowBytes = 4096;  // A multiple of every element size.

class Hasher {
 public:
  Hasher() : state_(XXH3_createState()) { XXH3_128bits_reset(state_.get()); }

  void Bytes(const void* data, size_t size) { XXH3_128bits_update(state_.get(), data, size); }
  // With its length, so that ("ab", "c") and ("a", "bc") differ.
  void String(absl::string_view text) {
    Number(static_cast<int64_t>(text.size()));
    Bytes(text.data(), text.size());
  }
  // Little-endian on any machine.
  void Number(int64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i));
    Bytes(bytes, sizeof(bytes));
  }
  std::string Hex() const {
    const XXH128_hash_t hash = XXH3_128bits_digest(state_.get());
    return absl::StrFormat("%016x%016x", hash.high64, hash.low64);
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

absl::Status HashContent(const Checkpoint& checkpoint, const TensorInfo& info, std::vector<uint8_t>* buffer,
                         Hasher* hasher) {
  if (info.bytes <= kWholeBytes) {
    buffer->resize(info.bytes);
    RWKV_RETURN_IF_ERROR(checkpoint.ReadBytes(info, 0, absl::MakeSpan(*buffer)));
    hasher->Bytes(buffer->data(), buffer->size());
    return absl::OkStatus();
  }
  buffer->resize(kWindowBytes);
  const int64_t element = ElementSize(info.type);
  for (int64_t i = 0; i < kWindows; ++i) {
    // Evenly from 0 to the last window's start, on an element's border; no overflow: 15 times a file's size.
    const int64_t offset = (info.bytes - kWindowBytes) * i / (kWindows - 1) / element * element;
    RWKV_RETURN_IF_ERROR(checkpoint.ReadBytes(info, offset, absl::MakeSpan(*buffer)));
    hasher->Bytes(buffer->data(), buffer->size());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> Fingerprint(const Checkpoint& checkpoint) {
  Hasher hasher;
  std::vector<uint8_t> buffer;
  for (const TensorInfo& info : checkpoint.tensors()) {
    hasher.String(info.name);
    hasher.String(ElementTypeName(info.type));
    std::vector<int64_t> shape = info.shape;
    shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
    hasher.Number(static_cast<int64_t>(shape.size()));
    for (int64_t size : shape) hasher.Number(size);
    if (absl::Status status = HashContent(checkpoint, info, &buffer, &hasher); !status.ok()) {
      return absl::Status(status.code(),
                          absl::StrCat(checkpoint.path(), ": tensor \"", info.name, "\": ", status.message()));
    }
  }
  return hasher.Hex();
}

std::string FingerprintWith(absl::string_view fingerprint, absl::string_view option) {
  Hasher hasher;
  hasher.String(fingerprint);
  hasher.String(option);
  return hasher.Hex();
}

}  // namespace rwkv::checkpoint
