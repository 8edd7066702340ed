// Little-endian numbers at checked places of a byte range.
#pragma once

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"

namespace rwkv::checkpoint {

// Who reads small pieces between large ones tells of each when it is done with it: whoever mapped the file may forget
// it.
using DoneWith = absl::FunctionRef<void(uint64_t offset, uint64_t size)>;
inline void KeepAll(uint64_t, uint64_t) {}

// A cursor. A read that does not fit returns false and leaves the cursor where it was.
class ByteReader {
 public:
  explicit ByteReader(absl::Span<const uint8_t> bytes, uint64_t position = 0)
      : bytes_(bytes), position_(position <= bytes.size() ? position : bytes.size()) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return bytes_.size() - position_; }

  bool Skip(uint64_t count) {
    if (count > remaining()) return false;
    position_ += count;
    return true;
  }
  bool Bytes(uint64_t count, absl::Span<const uint8_t>* out) {
    if (count > remaining()) return false;
    *out = bytes_.subspan(position_, count);
    position_ += count;
    return true;
  }
  bool U8(uint8_t* out) { return Number(1, out); }
  bool U16(uint16_t* out) { return Number(2, out); }
  bool U32(uint32_t* out) { return Number(4, out); }
  bool U64(uint64_t* out) { return Number(8, out); }

 private:
  template <typename T>
  bool Number(uint64_t size, T* out) {
    if (size > remaining()) return false;
    uint64_t value = 0;
    for (uint64_t i = 0; i < size; ++i) value |= uint64_t{bytes_[position_ + i]} << (8 * i);
    *out = static_cast<T>(value);
    position_ += size;
    return true;
  }

  absl::Span<const uint8_t> bytes_;
  uint64_t position_;
};

}  // namespace rwkv::checkpoint
