#include "services/router/core/embedding.h"

#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::FloatEq;
using ::testing::HasSubstr;

std::string Bytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

v1::EmbedRequest Request(v1::EmbedSource source, bool normalize = false) {
  v1::EmbedRequest request;
  request.set_source(source);
  request.set_normalize(normalize);
  return request;
}

TEST(EmbeddingTest, TheMeanIsTheSumOverTheTokens) {
  const auto mean = MakeEmbedding(Request(v1::EMBED_SOURCE_HIDDEN_MEAN), Bytes({6, -3, 0}), 3);
  ASSERT_THAT(mean, IsOk());
  EXPECT_THAT(mean->values(), ElementsAre(2, -1, 0));
  EXPECT_EQ(mean->prompt_tokens(), 3);
  for (const v1::EmbedSource source :
       {v1::EMBED_SOURCE_UNSPECIFIED, v1::EMBED_SOURCE_HIDDEN_LAST, v1::EMBED_SOURCE_STATE}) {
    const auto as_it_is = MakeEmbedding(Request(source), Bytes({6, -3, 0}), 3);
    ASSERT_THAT(as_it_is, IsOk());
    EXPECT_THAT(as_it_is->values(), ElementsAre(6, -3, 0));
  }
}

TEST(EmbeddingTest, NormalizedHasLengthOneAndZeroStaysZero) {
  const auto unit = MakeEmbedding(Request(v1::EMBED_SOURCE_HIDDEN_LAST, true), Bytes({3, 0, -4}), 1);
  ASSERT_THAT(unit, IsOk());
  EXPECT_THAT(unit->values(), ElementsAre(FloatEq(0.6f), 0, FloatEq(-0.8f)));
  const auto zero = MakeEmbedding(Request(v1::EMBED_SOURCE_HIDDEN_LAST, true), Bytes({0, 0}), 1);
  ASSERT_THAT(zero, IsOk());
  EXPECT_THAT(zero->values(), ElementsAre(0, 0));
}

TEST(EmbeddingTest, WhatIsNoVectorIsInternal) {
  for (const char* bytes : {"", "12345"}) {
    EXPECT_THAT(MakeEmbedding(Request(v1::EMBED_SOURCE_HIDDEN_LAST), bytes, 1),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("bytes")));
  }
}

TEST(EmbeddingTest, TheStateNeedsAMatrixThatFitsAMessage) {
  std::vector<v1::StateTensor> layout(2);
  layout[0].set_name("att.x_prev");
  layout[0].add_shape(768);
  layout[1].set_name("att.aa");
  layout[1].add_shape(768);
  EXPECT_THAT(CheckEmbedSource(v1::EMBED_SOURCE_HIDDEN_MEAN, layout), IsOk());
  EXPECT_THAT(CheckEmbedSource(v1::EMBED_SOURCE_STATE, layout),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no matrix state")));
  layout[1].set_name("att.state");
  layout[1].clear_shape();
  for (const int64_t size : {64, 64, 64}) layout[1].add_shape(size);
  EXPECT_THAT(CheckEmbedSource(v1::EMBED_SOURCE_STATE, layout), IsOk());
  layout[1].set_shape(0, 65);
  EXPECT_THAT(CheckEmbedSource(v1::EMBED_SOURCE_STATE, layout),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("1064960 bytes")));
}

TEST(EmbeddingTest, OnlyTheMeanAsksEveryEntry) {
  struct Case {
    v1::EmbedSource source;
    bool last;
    bool hidden_sum, hidden_last, wkv_state;
  };
  const Case kCases[] = {
      {v1::EMBED_SOURCE_UNSPECIFIED, true, false, true, false},
      {v1::EMBED_SOURCE_HIDDEN_LAST, false, false, false, false},
      {v1::EMBED_SOURCE_HIDDEN_LAST, true, false, true, false},
      {v1::EMBED_SOURCE_HIDDEN_MEAN, false, true, false, false},
      {v1::EMBED_SOURCE_HIDDEN_MEAN, true, true, false, false},
      {v1::EMBED_SOURCE_STATE, false, false, false, false},
      {v1::EMBED_SOURCE_STATE, true, false, false, true},
  };
  for (const Case& c : kCases) {
    v1::StepEntry entry;
    AskForEmbedding(c.source, c.last, &entry);
    EXPECT_EQ(entry.hidden_sum(), c.hidden_sum) << c.source << c.last;
    EXPECT_EQ(entry.hidden_last(), c.hidden_last) << c.source << c.last;
    EXPECT_EQ(entry.wkv_state(), c.wkv_state) << c.source << c.last;
  }
}

}  // namespace
}  // namespace rwkv::router
