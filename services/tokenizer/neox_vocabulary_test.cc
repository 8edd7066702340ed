#include "services/tokenizer/neox_vocabulary.h"

#include <fstream>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/status_matchers.h"

namespace rwkv::tokenizer {
namespace {

using ::nlohmann::json;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

json Small() {
  std::ifstream file("services/tokenizer/testdata/small_neox.json");
  EXPECT_TRUE(file);
  return json::parse(file);
}

TEST(NeoxVocabularyTest, ReadsTokensMergesAndAddedTokens) {
  ASSERT_OK_AND_ASSIGN(const NeoxVocabulary vocabulary, ParseNeoxVocabulary(Small().dump(), "t.json"));
  EXPECT_EQ(vocabulary.tokens.size(), 492);
  EXPECT_EQ(vocabulary.end_of_text, 0);
  EXPECT_EQ(vocabulary.tokens[0], "");  // Special.
  EXPECT_EQ(vocabulary.tokens[1], "");
  EXPECT_EQ(vocabulary.tokens[491], "  ");
  EXPECT_EQ(vocabulary.tokens[vocabulary.byte_ids[0x20]], " ");
  EXPECT_EQ(vocabulary.tokens[vocabulary.byte_ids[0xE4]], "\xE4");
  EXPECT_EQ(vocabulary.byte_ids[0xC0], NeoxVocabulary::kNoToken);
  EXPECT_EQ(vocabulary.byte_ids[0xFF], NeoxVocabulary::kNoToken);
  ASSERT_EQ(vocabulary.merges.size(), 224);
  for (const NeoxVocabulary::Merge& merge : vocabulary.merges) {
    EXPECT_EQ(vocabulary.tokens[merge.left] + vocabulary.tokens[merge.right], vocabulary.tokens[merge.result]);
  }
  ASSERT_EQ(vocabulary.added_tokens.size(), 25);
  EXPECT_EQ(vocabulary.added_tokens[0].text, "<|endoftext|>");
  EXPECT_TRUE(vocabulary.added_tokens[0].special);
  EXPECT_FALSE(vocabulary.added_tokens[0].normalized);
  EXPECT_EQ(vocabulary.added_tokens[24].text, "  ");
  EXPECT_TRUE(vocabulary.added_tokens[24].normalized);
}

TEST(NeoxVocabularyTest, ReadsWhatNewerWritersWrite) {
  json root = Small();
  for (json& merge : root["model"]["merges"]) {
    const auto text = merge.get<std::string>();
    const size_t blank = text.find(' ');
    merge = {text.substr(0, blank), text.substr(blank + 1)};
  }
  root["pre_tokenizer"]["use_regex"] = true;
  root["model"]["byte_fallback"] = false;
  root["model"]["ignore_merges"] = false;
  root["model"]["continuing_subword_prefix"] = "";
  root["post_processor"] = nullptr;
  ASSERT_OK_AND_ASSIGN(const NeoxVocabulary vocabulary, ParseNeoxVocabulary(root.dump(2), "t.json"));
  EXPECT_EQ(vocabulary.merges.size(), 224);
}

TEST(NeoxVocabularyTest, RefusesWhatIsNotNeoxAndWhatContradictsItself) {
  struct Case {
    const char* what;
    std::function<void(json&)> change;
    const char* message;
  };
  const Case kCases[] = {
      {"no normalizer", [](json& t) { t.erase("normalizer"); }, "normalizer.type is null"},
      {"NFKC", [](json& t) { t["normalizer"]["type"] = "NFKC"; }, "normalizer.type is \"NFKC\""},
      {"prefix space", [](json& t) { t["pre_tokenizer"]["add_prefix_space"] = true; }, "add_prefix_space is true"},
      {"no pattern", [](json& t) { t["pre_tokenizer"]["use_regex"] = false; }, "pre_tokenizer.use_regex is false"},
      {"template", [](json& t) { t["post_processor"]["type"] = "TemplateProcessing"; }, "post_processor.type"},
      {"other model", [](json& t) { t["model"]["type"] = "WordLevel"; }, "model.type is \"WordLevel\""},
      {"dropout", [](json& t) { t["model"]["dropout"] = 0.1; }, "model.dropout is 0.1"},
      {"unknown token", [](json& t) { t["model"]["unk_token"] = "<unk>"; }, "model.unk_token"},
      {"word suffix", [](json& t) { t["model"]["end_of_word_suffix"] = "</w>"; }, "model.end_of_word_suffix"},
      {"byte fallback", [](json& t) { t["model"]["byte_fallback"] = true; }, "model.byte_fallback"},
      {"no model", [](json& t) { t["model"] = 3; }, "model.vocab is null"},
      {"vocab a list",
       [](json& t) {
         t["model"]["vocab"] = {1, 2, 3};
       },
       "model.vocab is an array of 3"},
      {"negative id", [](json& t) { t["model"]["vocab"]["!"] = -1; }, "the id -1"},
      {"id a string", [](json& t) { t["model"]["vocab"]["!"] = "2"; }, "the id \"2\""},
      {"id beyond", [](json& t) { t["model"]["vocab"]["!"] = 492; }, "has id 492, but there are 492"},
      {"huge id", [](json& t) { t["model"]["vocab"]["!"] = UINT64_MAX; }, "18446744073709551615"},
      {"id twice", [](json& t) { t["model"]["vocab"]["!"] = 3; }, "two tokens have id 3"},
      {"not the alphabet", [](json& t) { t["model"]["vocab"]["a b"] = 492; }, "byte alphabet"},
      {"not the alphabet, CJK", [](json& t) { t["model"]["vocab"]["\u4E16"] = 492; }, "byte alphabet"},
      {"empty token", [](json& t) { t["model"]["vocab"][""] = 492; }, "has 0 bytes"},
      {"long token", [](json& t) { t["model"]["vocab"][std::string(1025, 'x')] = 492; }, "has 1025 bytes"},
      {"a byte is missing",
       [](json& t) {
         json& vocab = t["model"]["vocab"];
         vocab["!!!!!"] = vocab["!"];
         vocab.erase("!");
       },
       "single byte 0x21"},
      {"no added tokens", [](json& t) { t.erase("added_tokens"); }, "added_tokens is null"},
      {"added tokens empty", [](json& t) { t["added_tokens"] = json::array(); }, "no special <|endoftext|>"},
      {"end of text not special", [](json& t) { t["added_tokens"][0]["special"] = false; }, "no special"},
      {"added token a number", [](json& t) { t["added_tokens"][3] = 7; }, "added_tokens has 7"},
      {"added id missing", [](json& t) { t["added_tokens"][3].erase("id"); }, "each needs an id"},
      {"added id huge", [](json& t) { t["added_tokens"][3]["id"] = UINT64_MAX; }, "each needs an id"},
      {"added id taken", [](json& t) { t["added_tokens"][3]["id"] = 5; }, "id"},
      {"added id differs", [](json& t) { t["added_tokens"][0]["id"] = 491; }, "added token 491 has id 0"},
      {"added twice", [](json& t) { t["added_tokens"][3]["content"] = "  "; }, "content of another"},
      {"added empty", [](json& t) { t["added_tokens"][3]["content"] = ""; }, "has 0 bytes"},
      {"lstrip", [](json& t) { t["added_tokens"][3]["lstrip"] = true; }, "lstrip true"},
      {"no merges", [](json& t) { t["model"].erase("merges"); }, "model.merges is null"},
      {"merge without blank", [](json& t) { t["model"]["merges"][5] = "th"; }, "model.merges[5] is \"th\""},
      {"merge of three", [](json& t) { t["model"]["merges"][5] = "t h e"; }, "model.merges[5]"},
      {"merge a number", [](json& t) { t["model"]["merges"][5] = 5; }, "model.merges[5] is 5"},
      {"merge to no token", [](json& t) { t["model"]["merges"][5] = "! \""; }, "join to a third"},
      {"merge of no token",
       [](json& t) {
         t["model"]["merges"][5] = {"the", "zzzzz"};
       },
       "model.merges[5]"},
      {"merge twice", [](json& t) { t["model"]["merges"][5] = t["model"]["merges"][4]; }, "again"},
      {"merge to a special token",
       [](json& t) {
         t["model"]["vocab"]["<|endoftext|"] = 492;
         t["model"]["merges"].push_back("<|endoftext| >");
       },
       "join to a third"},
  };
  for (const Case& c : kCases) {
    SCOPED_TRACE(c.what);
    json root = Small();
    c.change(root);
    EXPECT_THAT(ParseNeoxVocabulary(root.dump(), "t.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("t.json"), HasSubstr(c.message))));
  }
}

TEST(NeoxVocabularyTest, RefusesWhatIsNoJsonObjectOrTooLarge) {
  const std::string whole = Small().dump();
  const auto expect = [](const std::string& text, const char* message) {
    EXPECT_THAT(ParseNeoxVocabulary(text, "t.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("t.json"), HasSubstr(message))));
  };
  expect("", "not JSON");
  expect("{", "not JSON");
  expect(whole.substr(0, whole.size() / 2), "not JSON");
  expect("{\"a\":\"\xFF\"}", "not JSON");
  expect("[]", "not a JSON object");
  expect(absl::StrCat("{\"a\":", std::string(100, '['), std::string(100, ']'), "}"), "nested deeper");
  expect(std::string(1 << 20, '['), "not JSON");
  expect(std::string(kMaxNeoxFileBytes + 1, ' '), "bytes of a tokenizer.json");
}

}  // namespace
}  // namespace rwkv::tokenizer
