#include "services/tokenizer/open_tokenizer.h"

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::tokenizer {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(OpenTokenizerTest, TellsTheKindByContent) {
  ASSERT_OK_AND_ASSIGN(const auto world, OpenTokenizer("services/tokenizer/testdata/small_vocabulary.txt"));
  EXPECT_EQ(world->name(), "world");
  EXPECT_EQ(world->vocab_size(), 308);
  ASSERT_OK_AND_ASSIGN(const auto neox, OpenTokenizer("services/tokenizer/testdata/small_neox.json"));
  EXPECT_EQ(neox->name(), "neox");
  EXPECT_EQ(neox->vocab_size(), 492);
}

TEST(OpenTokenizerTest, UnreadableFilesAreNamed) {
  EXPECT_THAT(OpenTokenizer("/nonexistent/vocabulary.txt"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nonexistent/vocabulary.txt")));
  EXPECT_FALSE(OpenTokenizer("/").ok());
  EXPECT_THAT(OpenTokenizer("/dev/zero"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bytes")));
}

TEST(OpenTokenizerTest, WhatIsNeitherIsRefused) {
  for (const char* content : {"", "hello", "{}", " \n{\"model\": 1}", "[1]",
                              "\x7F"
                              "ELF"}) {
    EXPECT_THAT(TokenizerFromString(content, "some/file"),
                StatusIs(absl::StatusCode::kInvalidArgument, StartsWith("some/file")))
        << content;
  }
}

}  // namespace
}  // namespace rwkv::tokenizer
