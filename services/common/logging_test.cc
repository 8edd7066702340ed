#include "services/common/logging.h"

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

using ::testing::MatchesRegex;

TEST(LoggingTest, LineHasSeverityProcessEventAndFields) {
  EXPECT_EQ(FormatLogLine(Severity::kInfo, "worker-0", "stage_ready", {{"layers", "0:6"}, {"model", "tiny"}}),
            "INFO worker-0 stage_ready layers=0:6 model=tiny");
  EXPECT_EQ(FormatLogLine(Severity::kWarning, "r", "e", {}), "WARNING r e");
  EXPECT_EQ(FormatLogLine(Severity::kError, "r", "e", {}), "ERROR r e");
}

TEST(LoggingTest, ValuesOfEveryKind) {
  EXPECT_EQ(FormatLogLine(Severity::kInfo, "p", "e",
                          {{"bool", true},
                           {"int", -3},
                           {"int64", int64_t{-5000000000}},
                           {"uint64", uint64_t{18446744073709551615u}},
                           {"size", sizeof(int)},
                           {"double", 0.25},
                           {"text", std::string("plain")},
                           {"status", absl::NotFoundError("gone")}}),
            "INFO p e bool=true int=-3 int64=-5000000000 uint64=18446744073709551615 size=4 double=0.25 text=plain "
            "status=\"NOT_FOUND: gone\"");
}

TEST(LoggingTest, ValuesThatWouldBreakTheLineAreQuoted) {
  EXPECT_EQ(LogValue("").text(), "\"\"");
  EXPECT_EQ(LogValue("two words").text(), "\"two words\"");
  EXPECT_EQ(LogValue("a=b").text(), "\"a=b\"");
  EXPECT_EQ(LogValue("say \"hi\" \\ bye").text(), R"("say \"hi\" \\ bye")");
  EXPECT_EQ(LogValue("line\r\nline\ttab\x01").text(), R"("line\r\nline\ttab\x01")");
  EXPECT_EQ(LogValue("0:6,7").text(), "0:6,7");
}

TEST(LoggingTest, LongLineIsCut) {
  const std::string line = FormatLogLine(Severity::kInfo, "p", "e", {{"text", std::string(100000, 'x')}});
  EXPECT_EQ(line.size(), 8192);
}

TEST(LoggingTest, LineOnStandardErrorStartsWithUtcTime) {
  InitLogging("first");
  InitLogging("worker-0");
  ::testing::internal::CaptureStderr();
  LogInfo("stage_ready", {{"pattern", "%v{}"}});
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              MatchesRegex("[0-9]+-[0-9]+-[0-9]+T[0-9]+:[0-9]+:[0-9]+\\.[0-9]+Z INFO worker-0 stage_ready "
                           "pattern=%v\\{\\}\n"));
}

}  // namespace
}  // namespace rwkv::common
