#include "services/tokenizer/stream_decoder.h"

#include <random>
#include <string>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace rwkv::tokenizer {
namespace {

const std::string kBad = "\xEF\xBF\xBD";

TEST(StreamDecoderTest, HoldsBackOnlyAnUnfinishedCharacter) {
  StreamDecoder decoder;
  EXPECT_EQ(decoder.Push("a\xE4"), "a");
  EXPECT_EQ(decoder.Push("\xBD"), "");
  EXPECT_EQ(decoder.Push("\xA0"
                         "b"),
            "你b");
  EXPECT_EQ(decoder.Push("\xF0\x9F\x98"), "");
  EXPECT_EQ(decoder.Push("\x80"), "😀");
  EXPECT_EQ(decoder.Finish(), "");
}

TEST(StreamDecoderTest, ReplacesAtOnceWhatCannotBecomeACharacter) {
  StreamDecoder decoder;
  EXPECT_EQ(decoder.Push("\xFF"), kBad);
  EXPECT_EQ(decoder.Push("\x80"), kBad);
  EXPECT_EQ(decoder.Push("\xC0"), kBad);
  EXPECT_EQ(decoder.Push("\xF5"), kBad);
  EXPECT_EQ(decoder.Push("\xED\xA0"), kBad + kBad);  // A surrogate: the second byte is impossible, not incomplete.
  EXPECT_EQ(decoder.Push("\xE0\x80"), kBad + kBad);  // Overlong.
  EXPECT_EQ(decoder.Push("\xE4"), "");
  EXPECT_EQ(decoder.Push("x"), kBad + "x");
}

TEST(StreamDecoderTest, FinishReplacesTheRestOnceAndStartsAnew) {
  StreamDecoder decoder;
  EXPECT_EQ(decoder.Push("a\xF0\x9F\x98"), "a");
  EXPECT_EQ(decoder.Finish(), kBad);
  EXPECT_EQ(decoder.Finish(), "");
  EXPECT_EQ(decoder.Push("\x98"), kBad);
}

// Unicode 15, chapter 3, tables 3-8 to 3-11.
TEST(StreamDecoderTest, MaximalSubpartsAsUnicodeShowsThem) {
  EXPECT_EQ(DecodeUtf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(DecodeUtf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(DecodeUtf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            kBad + kBad + kBad + kBad + kBad + "A" + kBad + kBad + "B");
  EXPECT_EQ(DecodeUtf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), kBad + kBad + kBad + kBad + "A");
}

TEST(StreamDecoderTest, CutsDoNotMatter) {
  std::mt19937 random(3);
  const std::string alphabet[] = {"a", "é", "你", "😀", "\xE4", "\xBD", "\xF0\x9F", "\xC3", "\xED\xA0", "\xFF", "\n"};
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    for (int n = random() % 12; n > 0; --n) bytes += alphabet[random() % std::size(alphabet)];
    StreamDecoder decoder;
    std::string text;
    for (size_t begin = 0; begin < bytes.size();) {
      const size_t size = 1 + random() % 3;
      const std::string part = decoder.Push(absl::string_view(bytes).substr(begin, size));
      ASSERT_TRUE(IsValidUtf8(part));
      text += part;
      // Never more than the 3 bytes of an unfinished character behind, whatever came before.
      begin += size;
    }
    text += decoder.Finish();
    ASSERT_EQ(text, DecodeUtf8(bytes)) << absl::CHexEscape(bytes);
    ASSERT_TRUE(IsValidUtf8(text));
    if (IsValidUtf8(bytes)) {
      ASSERT_EQ(text, bytes);
    }
  }
}

TEST(StreamDecoderTest, ValidUtf8) {
  for (const char* valid : {"", "a", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
                            "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    EXPECT_TRUE(IsValidUtf8(valid)) << absl::CHexEscape(valid);
  }
  for (const char* invalid : {"\x80", "\xC1\xBF", "\xC2", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xEF\xBF",
                              "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "a\xFF", "\xC3\xA9\xC3"}) {
    EXPECT_FALSE(IsValidUtf8(invalid)) << absl::CHexEscape(invalid);
  }
}

}  // namespace
}  // namespace rwkv::tokenizer
