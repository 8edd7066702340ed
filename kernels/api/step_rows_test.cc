#include "kernels/api/step_rows.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/dispatch/open_device.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class StepRowsLoaderTest : public ::testing::Test {
 protected:
  StepRowsLoaderTest()
      : device_(*OpenDevice("reference")),
        stream_(*device_->NewStream()),
        loader_(*StepRowsLoader::Create(*device_, 6, 10)) {}

  absl::StatusOr<StepRows> Load(const std::vector<SequenceSpan>& spans, const std::vector<int32_t>& tokens) {
    return loader_->Load(spans, tokens, 4, *stream_);
  }

  const std::unique_ptr<Device> device_;
  const std::unique_ptr<Stream> stream_;
  const std::unique_ptr<StepRowsLoader> loader_;
};

TEST_F(StepRowsLoaderTest, PutsSpansAndTokensIntoDeviceMemory) {
  for (int round = 0; round < 2; ++round) {  // A slot of the step before may be given again.
    ASSERT_OK_AND_ASSIGN(const StepRows step, Load({{3, 0, 2}, {-1, 2, 1}, {0, 3, 1}, {-1, 4, 1}}, {7, 9, 0, 1, 0}));
    EXPECT_EQ(step.rows, 5);
    EXPECT_EQ(step.span_count, 4);
    std::vector<SequenceSpan> spans(4);
    std::vector<int32_t> tokens(5);
    ASSERT_OK(stream_->Copy(spans.data(), step.spans, 4 * sizeof(SequenceSpan)));
    ASSERT_OK(stream_->Copy(tokens.data(), step.tokens, 5 * sizeof(int32_t)));
    ASSERT_OK(stream_->Synchronize());
    EXPECT_EQ(spans[2].slot, 0);
    EXPECT_EQ(spans[2].row_begin, 3);
    EXPECT_EQ(tokens, (std::vector<int32_t>{7, 9, 0, 1, 0}));
  }
}

TEST_F(StepRowsLoaderTest, BadStepsAreErrorsThatNameTheThing) {
  struct Case {
    std::vector<SequenceSpan> spans;
    std::vector<int32_t> tokens;
    std::string message;
  };
  const std::vector<Case> cases = {
      {{}, {}, "0 rows, not in 1 .. 6"},
      {{{0, 0, 7}}, {1, 1, 1, 1, 1, 1, 1}, "7 rows, not in 1 .. 6"},
      {{}, {1}, "spans cover 0 of 1 rows"},
      {{{4, 0, 1}}, {1}, "slot 4 is outside the pool of 4"},
      {{{-2, 0, 1}}, {1}, "slot -2 is outside the pool of 4"},
      {{{2, 0, 1}, {2, 1, 1}}, {1, 1}, "slot 2 is given twice"},
      {{{2, 0, 1}, {1, 2, 1}}, {1, 1, 1}, "span 1 has 1 rows from 2; expected at least one from 1"},
      {{{2, 1, 1}}, {1}, "span 0 has 1 rows from 1"},
      {{{2, 0, 0}}, {1}, "span 0 has 0 rows from 0"},
      {{{2, 0, 1}, {1, 1, 3}}, {1, 1, 1}, "span 1 has 3 rows"},
      {{{2, 0, 1}, {1, 1, INT64_MAX}}, {1, 1, 1}, "span 1 has"},
      {{{2, 0, 1}}, {1, 1}, "spans cover 1 of 2 rows"},
      {{{2, 0, 2}}, {1, 10}, "token 10 in row 1 is outside the vocabulary of 10"},
      {{{2, 0, 2}}, {-1, 1}, "token -1 in row 0"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(Load(c.spans, c.tokens), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(c.message)));
  }
  EXPECT_THAT(loader_->Load({{0, 0, 1}}, {1}, 0, *stream_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0 slots")));
}

}  // namespace
}  // namespace rwkv::kernels
