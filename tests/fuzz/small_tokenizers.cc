#include "tests/fuzz/small_tokenizers.h"

#include "absl/strings/str_cat.h"

namespace rwkv::testing {

std::string SingleByteLines() {
  std::string lines;
  for (int byte = 0; byte < 256; ++byte) {
    absl::StrAppend(&lines, byte + 1, " b'\\x", absl::Hex(byte, absl::kZeroPad2), "' 1\n");
  }
  return lines;
}

std::string SmallWorldVocabulary() {
  return absl::StrCat(SingleByteLines(), "257 '  ' 2\n258 'ab' 2\n259 'abc' 3\n260 b'\\xe4\\xbd' 2\n261 'abcabc' 6\n");
}

std::string SmallNeoxTokenizer(absl::string_view merges) {
  // The printable bytes as themselves, the others as U+0100 and on.
  std::string vocab = R"("<|endoftext|>":0,"<|padding|>":1)";
  int next = 0x100;
  int id = 2;
  for (int byte = 0; byte < 256; ++byte) {
    const bool prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    absl::StrAppend(&vocab, ",\"\\u", absl::Hex(prints ? byte : next++, absl::kZeroPad4), "\":", id++);
  }
  for (absl::string_view token : {"th", "the", "Ġt", "Ġthe", "Ã©", "aa", "aaaa"}) {
    absl::StrAppend(&vocab, ",\"", token, "\":", id++);
  }
  const auto added = [](int id, absl::string_view text, bool special) {
    const absl::string_view yes = "true", no = "false";
    return absl::StrCat(R"({"id":)", id, R"(,"content":")", text, R"(","single_word":false,"lstrip":false,"rstrip":)",
                        R"(false,"special":)", special ? yes : no, R"(,"normalized":)", special ? no : yes, "}");
  };
  return absl::StrCat(R"({"added_tokens":[)", added(0, "<|endoftext|>", true), ",", added(1, "<|padding|>", true), ",",
                      added(id, "   ", false), ",", added(id + 1, "  ", false),
                      R"(],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},)",
                      R"("model":{"type":"BPE","vocab":{)", vocab, R"(},"merges":[)", merges, "]}}");
}

}  // namespace rwkv::testing
