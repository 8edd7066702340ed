#include "services/router/core/serving_model.h"

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class FakeTokenizer : public tokenizer::Tokenizer {
 public:
  FakeTokenizer(absl::string_view name, uint32_t vocab_size) : name_(name), vocab_size_(vocab_size) {}
  absl::string_view name() const override { return name_; }
  std::vector<uint32_t> Encode(absl::string_view bytes) const override { return {}; }
  absl::string_view TokenBytes(uint32_t id) const override { return ""; }
  uint32_t vocab_size() const override { return vocab_size_; }
  uint32_t end_of_text() const override { return 0; }

 private:
  const std::string name_;
  const uint32_t vocab_size_;
};

ServingModel Serve(int32_t rows, const std::vector<const tokenizer::Tokenizer*>& tokenizers) {
  v1::ModelInfo info;
  info.set_vocab_size(rows);
  info.set_tokenizer("what the worker thinks");
  return MakeServingModel(info, tokenizers);
}

TEST(ServingModelTest, ATokenizerThatFitsIsUsedAndItsPaddingBanned) {
  struct Case {
    const char* name;
    uint32_t ids;
    int32_t rows;
  };
  for (const Case& c :
       {Case{"world", 65530, 65536}, Case{"neox", 50277, 50304}, Case{"world", 4090, 4096}, Case{"neox", 492, 1000}}) {
    const FakeTokenizer tokenizer(c.name, c.ids);
    const ServingModel model = Serve(c.rows, {&tokenizer});
    EXPECT_EQ(model.tokenizer, &tokenizer);
    EXPECT_EQ(model.info.tokenizer(), c.name);
    EXPECT_EQ(model.no_tokenizer, "");
    EXPECT_THAT(model.banned_token_ids, ElementsAre(c.ids, static_cast<uint32_t>(c.rows)));
  }
}

TEST(ServingModelTest, WithoutPaddingNothingIsBanned) {
  const FakeTokenizer tokenizer("neox", 50277);
  const ServingModel model = Serve(50277, {&tokenizer});
  EXPECT_EQ(model.tokenizer, &tokenizer);
  EXPECT_THAT(model.banned_token_ids, IsEmpty());
}

TEST(ServingModelTest, ATokenizerThatDoesNotFitIsRefused) {
  const FakeTokenizer world("world", 65530);
  const FakeTokenizer neox("neox", 50277);
  const FakeTokenizer own("world", 300);
  EXPECT_EQ(Serve(256, {&world}).no_tokenizer, "\"world\" with 65530 ids does not fit");
  EXPECT_EQ(Serve(299, {&own}).no_tokenizer, "\"world\" with 300 ids does not fit");
  // A published one, however many rows to spare there are.
  EXPECT_EQ(Serve(70000, {&world, &neox}).no_tokenizer,
            "\"world\" with 65530 ids does not fit, \"neox\" with 50277 ids does not fit");
  EXPECT_EQ(Serve(65536, {}).no_tokenizer, "the router was started without one");
  const ServingModel model = Serve(256, {&world});
  EXPECT_EQ(model.tokenizer, nullptr);
  EXPECT_EQ(model.info.tokenizer(), "");
  EXPECT_THAT(model.banned_token_ids, IsEmpty());
}

TEST(ServingModelTest, WhatCouldNotBeOpenedIsSaid) {
  v1::ModelInfo info;
  info.set_vocab_size(256);
  EXPECT_EQ(MakeServingModel(info, {}, {"m.gguf: no token is the single byte 0x00"}).no_tokenizer,
            "m.gguf: no token is the single byte 0x00");
  const FakeTokenizer world("world", 65530);
  EXPECT_EQ(MakeServingModel(info, {&world}, {"m.gguf: odd"}).no_tokenizer,
            "m.gguf: odd, \"world\" with 65530 ids does not fit");
}

TEST(ServingModelTest, TheFirstThatFitsIsUsed) {
  const FakeTokenizer own("world", 4096);
  const FakeTokenizer world("world", 65530);
  const FakeTokenizer neox("neox", 50277);
  EXPECT_EQ(Serve(65536, {&world, &neox}).tokenizer, &world);
  EXPECT_EQ(Serve(65536, {&neox, &world}).tokenizer, &world);
  EXPECT_EQ(Serve(50304, {&world, &neox}).tokenizer, &neox);
  EXPECT_EQ(Serve(4096, {&own, &world, &neox}).tokenizer, &own);
  EXPECT_EQ(Serve(65536, {&own, &world}).tokenizer, &own);  // The operator's choice.
  EXPECT_EQ(Serve(50304, {&world, &neox}).no_tokenizer, "");
}

}  // namespace
}  // namespace rwkv::router
