#include "services/tokenizer/world_vocabulary.h"

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/tokenizer/stream_decoder.h"

namespace rwkv::tokenizer {
namespace {

// Digits only, no sign, no leading zero.
bool ParseDecimal(absl::string_view text, uint32_t* value) {
  if (text.empty() || (text[0] == '0' && text.size() > 1)) return false;
  for (char c : text) {
    if (c < '0' || c > '9') return false;
  }
  return absl::SimpleAtoi(text, value);
}

bool ParseHex(absl::string_view text, uint32_t* value) {
  *value = 0;
  for (char c : text) {
    const uint32_t digit = c >= '0' && c <= '9'   ? c - '0'
                           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                  : 16;
    if (digit == 16) return false;
    *value = *value << 4 | digit;
  }
  return true;
}

void AppendUtf8(uint32_t code_point, std::string& out) {
  const auto append = [&](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    append(code_point);
  } else if (code_point < 0x800) {
    append(0xC0 | code_point >> 6);
    append(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    append(0xE0 | code_point >> 12);
    append(0x80 | (code_point >> 6 & 0x3F));
    append(0x80 | (code_point & 0x3F));
  } else {
    append(0xF0 | code_point >> 18);
    append(0x80 | (code_point >> 12 & 0x3F));
    append(0x80 | (code_point >> 6 & 0x3F));
    append(0x80 | (code_point & 0x3F));
  }
}

// What Python's repr() prints for str ('..' or "..") or bytes (b'..' or b".."). In a str, \xHH is a code point; in
// bytes it is a byte. The message of an error says what is wrong, without the line.
absl::StatusOr<std::string> ParseLiteral(absl::string_view literal) {
  const bool is_bytes = !literal.empty() && literal[0] == 'b';
  if (is_bytes) literal.remove_prefix(1);
  if (literal.size() < 2 || (literal[0] != '\'' && literal[0] != '"') || literal.back() != literal[0]) {
    return absl::InvalidArgumentError("the literal is not in quotes");
  }
  const char quote = literal[0];
  const absl::string_view body = literal.substr(1, literal.size() - 2);
  if (!is_bytes && !IsValidUtf8(body)) return absl::InvalidArgumentError("the literal is not UTF-8");
  std::string token;
  for (size_t i = 0; i < body.size();) {
    const char c = body[i];
    if (c == quote) return absl::InvalidArgumentError("the literal has a quote inside");
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) {
      return absl::InvalidArgumentError(absl::StrFormat("the literal has the control character \\x%02x inside", byte));
    }
    if (is_bytes && byte >= 0x80) return absl::InvalidArgumentError("the bytes literal is not ASCII");
    if (c != '\\') {
      token.push_back(c);
      ++i;
      continue;
    }
    if (i + 1 == body.size()) return absl::InvalidArgumentError("the literal ends in an escape");
    const char escape = body[i + 1];
    i += 2;
    size_t digits = 0;
    switch (escape) {
      case 'n':
        token.push_back('\n');
        continue;
      case 't':
        token.push_back('\t');
        continue;
      case 'r':
        token.push_back('\r');
        continue;
      case '\\':
      case '\'':
      case '"':
        token.push_back(escape);
        continue;
      case 'x':
        digits = 2;
        break;
      case 'u':
        digits = is_bytes ? 0 : 4;
        break;
      case 'U':
        digits = is_bytes ? 0 : 8;
        break;
      default:
        break;
    }
    if (digits == 0) return absl::InvalidArgumentError("the literal has an unknown escape");
    uint32_t value = 0;
    if (body.size() - i < digits || !ParseHex(body.substr(i, digits), &value)) {
      return absl::InvalidArgumentError(absl::StrCat("an escape of the literal lacks its ", digits, " hex digits"));
    }
    i += digits;
    if (is_bytes) {
      token.push_back(static_cast<char>(value));
    } else if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) {
      return absl::InvalidArgumentError(absl::StrFormat("U+%04X is not a character", value));
    } else {
      AppendUtf8(value, token);
    }
  }
  return token;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ParseWorldVocabulary(absl::string_view vocabulary, absl::string_view name) {
  std::vector<std::string> tokens(1);
  while (!vocabulary.empty()) {
    // On LF only: a literal may hold any other character that some call a line end.
    const size_t line_end = vocabulary.find('\n');
    absl::string_view line = vocabulary.substr(0, line_end);
    vocabulary.remove_prefix(line_end == absl::string_view::npos ? vocabulary.size() : line_end + 1);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);

    const auto expected_id = static_cast<uint32_t>(tokens.size());
    const auto error = [&](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat(name, ":", expected_id, ": ", what));
    };
    const size_t first_blank = line.find(' ');
    const size_t last_blank = line.rfind(' ');
    if (first_blank == last_blank) return error("a line is `<id> <literal> <length>`");
    uint32_t id = 0;
    uint32_t length = 0;
    if (!ParseDecimal(line.substr(0, first_blank), &id) || id != expected_id) {
      return error(absl::StrCat("the id has to be ", expected_id, "; ids rise from 1 by 1"));
    }
    if (!ParseDecimal(line.substr(last_blank + 1), &length)) return error("the length is not a number");
    absl::StatusOr<std::string> token = ParseLiteral(line.substr(first_blank + 1, last_blank - first_blank - 1));
    if (!token.ok()) return error(token.status().message());
    if (token->size() != length) {
      return error(absl::StrCat("the token has ", token->size(), " bytes, but its length says ", length));
    }
    if (token->empty()) return error("the token is empty");
    tokens.push_back(*std::move(token));
  }
  return tokens;
}

}  // namespace rwkv::tokenizer
