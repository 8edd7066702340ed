#include "services/tokenizer/completing_tokens.h"

#include <algorithm>
#include <bitset>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {
namespace {

constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

bool Completes(absl::string_view token, absl::string_view stop) {
  if (absl::StrContains(token, stop)) return true;
  for (size_t begin = 1; begin < stop.size(); ++begin) {
    if (absl::StartsWith(token, stop.substr(begin))) return true;
  }
  return false;
}

}  // namespace

absl::optional<std::vector<uint32_t>> CompletingTokens(const Tokenizer& tokenizer,
                                                       absl::Span<const std::string> stops) {
  std::bitset<256> last_bytes;  // A token without one of these completes nothing.
  for (const std::string& stop : stops) {
    if (absl::StrContains(stop, kReplacement)) return absl::nullopt;
    if (!stop.empty()) last_bytes.set(static_cast<unsigned char>(stop.back()));
  }
  std::vector<uint32_t> ids;
  for (uint32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const absl::string_view token = tokenizer.TokenBytes(id);
    const auto is_last_byte = [&](char byte) { return last_bytes[static_cast<unsigned char>(byte)]; };
    if (std::none_of(token.begin(), token.end(), is_last_byte)) continue;
    if (std::any_of(stops.begin(), stops.end(),
                    [&](const std::string& stop) { return !stop.empty() && Completes(token, stop); })) {
      ids.push_back(id);
    }
  }
  return ids;
}

}  // namespace rwkv::tokenizer
