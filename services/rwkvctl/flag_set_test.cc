#include "services/rwkvctl/flag_set.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class FlagSetTest : public ::testing::Test {
 protected:
  FlagSetTest() {
    flags_.AddString("word", "TEXT", "a word", [this](const std::string& value) {
      words_.push_back(value);
      return value == "bad" ? absl::InvalidArgumentError("is bad") : absl::OkStatus();
    });
    flags_.AddInt32("signed", "a number", [this](int32_t value) { signed_ = value; });
    flags_.AddUint32("small", "a number", [this](uint32_t value) { small_ = value; });
    flags_.AddUint64("large", "a number", [this](uint64_t value) { large_ = value; });
    flags_.AddFloat("real", "a number", [this](float value) { real_ = value; });
    flags_.AddBool("switch", "on or off", &on_);
  }

  FlagSet flags_;
  std::vector<std::string> words_;
  int32_t signed_ = 0;
  uint32_t small_ = 0;
  uint64_t large_ = 0;
  float real_ = 0;
  bool on_ = false;
};

TEST_F(FlagSetTest, ValuesFollowOrStandBehindAnEqualsSign) {
  EXPECT_THAT(flags_.Parse({"a", "--word", "x", "--word=y=z", "b", "--word=", "-word", "w", "--switch", "c"}),
              IsOkAndHolds(ElementsAre("a", "b", "c")));
  EXPECT_THAT(words_, ElementsAre("x", "y=z", "", "w"));
  EXPECT_TRUE(on_);
}

TEST_F(FlagSetTest, AValueMayLookLikeAFlag) {
  EXPECT_THAT(flags_.Parse({"--word", "--switch", "--signed", "-5", "--real", "-1.5e-3"}), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(words_, ElementsAre("--switch"));
  EXPECT_FALSE(on_);
  EXPECT_EQ(signed_, -5);
  EXPECT_EQ(real_, -1.5e-3f);
}

TEST_F(FlagSetTest, NothingIsAFlagAfterTwoDashesAndDashAndNumbersNeverAre) {
  EXPECT_THAT(flags_.Parse({"-", "-1", "--", "--word", "-x", "--"}),
              IsOkAndHolds(ElementsAre("-", "-1", "--word", "-x", "--")));
}

TEST_F(FlagSetTest, BoolsMayBeSpelledOut) {
  EXPECT_OK(flags_.Parse({"--switch=true"}));
  EXPECT_TRUE(on_);
  EXPECT_OK(flags_.Parse({"--switch=false"}));
  EXPECT_FALSE(on_);
  EXPECT_THAT(flags_.Parse({"--switch=1"}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--switch")));
}

TEST_F(FlagSetTest, ErrorsNameTheFlagAndTheValue) {
  struct Case {
    std::vector<std::string> arguments;
    const char* flag;
    const char* message;
  };
  const Case kCases[] = {
      {{"--wurd", "x"}, "--wurd", "unknown"},
      {{"--wurd=x"}, "--wurd", "unknown"},
      {{"--word"}, "--word", "needs a value"},
      {{"--word", "bad"}, "--word", "is bad"},
      {{"--signed", "2147483648"}, "--signed", "2147483648"},
      {{"--signed", "-2147483649"}, "--signed", "-2147483649"},
      {{"--signed", "1.5"}, "--signed", "1.5"},
      {{"--signed", "--5"}, "--signed", "--5"},
      {{"--small", "4294967296"}, "--small", "4294967296"},
      {{"--small", "-1"}, "--small", "-1"},
      {{"--small", "+1"}, "--small", "+1"},
      {{"--small", " 1"}, "--small", " 1"},
      {{"--small", "0x10"}, "--small", "0x10"},
      {{"--small="}, "--small", "\"\""},
      {{"--large", "18446744073709551616"}, "--large", "18446744073709551616"},
      {{"--real", "nan"}, "--real", "nan"},
      {{"--real", "inf"}, "--real", "inf"},
      {{"--real", "1e39"}, "--real", "1e39"},
      {{"--real", "1,5"}, "--real", "1,5"},
      {{"--real", "1.5 "}, "--real", "1.5 "},
      {{"--real", ""}, "--real", "\"\""},
  };
  for (const Case& bad : kCases) {
    EXPECT_THAT(flags_.Parse(bad.arguments),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(bad.flag), HasSubstr(bad.message))));
  }
}

TEST_F(FlagSetTest, RangesReachTheirEnds) {
  EXPECT_OK(
      flags_.Parse({"--signed=-2147483648", "--small=4294967295", "--large=18446744073709551615", "--real=3e38"}));
  EXPECT_EQ(signed_, std::numeric_limits<int32_t>::min());
  EXPECT_EQ(small_, std::numeric_limits<uint32_t>::max());
  EXPECT_EQ(large_, std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(real_, 3e38f);
}

TEST_F(FlagSetTest, HelpNamesEveryFlag) {
  EXPECT_THAT(flags_.Help(), AllOf(HasSubstr("--word TEXT"), HasSubstr("a word\n"), HasSubstr("--switch ")));
}

TEST(FlagSetHelpTest, ALongNameIsPartedFromItsHelp) {
  FlagSet flags;
  std::string value;
  flags.AddString("name-of-twenty-characters", "TEXT", "help", &value);
  EXPECT_EQ(flags.Help(), "  --name-of-twenty-characters TEXT help\n");
}

TEST(ParseTokenIdsTest, CommasAndBlanksPartIds) {
  EXPECT_THAT(ParseTokenIds("1,2,3"), IsOkAndHolds(ElementsAre(1, 2, 3)));
  EXPECT_THAT(ParseTokenIds(" 1 2\n3,4 , 5 "), IsOkAndHolds(ElementsAre(1, 2, 3, 4, 5)));
  EXPECT_THAT(ParseTokenIds("4294967295"), IsOkAndHolds(ElementsAre(4294967295u)));
  EXPECT_THAT(ParseTokenIds(""), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(ParseTokenIds(" "), IsOkAndHolds(IsEmpty()));
}

TEST(ParseTokenIdsTest, BadIdsAreNamedByPlace) {
  EXPECT_THAT(ParseTokenIds("1,x,3"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token id 1: \"x\"")));
  EXPECT_THAT(ParseTokenIds("1,,3"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token id 1 is empty")));
  EXPECT_THAT(ParseTokenIds("1,2,"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token id 2 is empty")));
  EXPECT_THAT(ParseTokenIds("-1"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
  EXPECT_THAT(ParseTokenIds("4294967296"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4294967296")));
}

}  // namespace
}  // namespace rwkv::rwkvctl
