#include "services/tokenizer/tokenizer.h"

namespace rwkv::tokenizer {

std::string Tokenizer::Decode(absl::Span<const uint32_t> ids) const {
  std::string bytes;
  for (uint32_t id : ids) {
    const absl::string_view token = TokenBytes(id);
    bytes.append(token.data(), token.size());
  }
  return bytes;
}

}  // namespace rwkv::tokenizer
