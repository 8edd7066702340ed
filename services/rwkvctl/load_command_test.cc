// rwkvctl load, as a command line.
#include <fstream>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/rwkvctl/rwkvctl_fixture.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using ::testing::StartsWith;

TEST_F(RwkvctlTest, LoadReportsAsATableOrAsOneJsonObject) {
  router_.answer = "abcdef";
  EXPECT_EQ(Call({"load", "--streams", "1", "--requests", "3", "--prompt-tokens", "5", "--max-tokens", "4",
                  "--temperature", "0.5"}),
            0);
  EXPECT_THAT(out_, AllOf(StartsWith("TIME"), HasSubstr("first token"), HasSubstr("requests completed  3"),
                          HasSubstr("tokens generated    12")));
  ASSERT_THAT(router_.generate_requests, SizeIs(3));
  EXPECT_THAT(request().tokens().ids(), SizeIs(5));
  EXPECT_EQ(request().sampling().temperature(), 0.5f);

  const std::string path = (folder_ / "report.json").string();
  EXPECT_EQ(Call({"load", "--rate", "1000", "--max-in-flight", "1", "--requests", "2", "--max-tokens", "4",
                  "--sessions", "2", "--ttft-limit", "1h", "--load-seed", "9", "--json", "--out", path}),
            0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(std::count(out_.begin(), out_.end(), '\n'), 1);
  EXPECT_EQ(json["settings"]["rate"], 1000);
  EXPECT_EQ(json["settings"]["arrivals"], "poisson");
  EXPECT_EQ(json["settings"]["load_seed"], 9);
  EXPECT_EQ(json["settings"]["turns"], 4);
  EXPECT_EQ(json["requests"]["completed"], 2);
  EXPECT_EQ(json["goodput"]["requests"], 2);
  EXPECT_EQ(json["tokens"]["generated"], 8);
  std::ifstream file(path);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(file), {}), out_);
}

TEST_F(RwkvctlTest, LoadCountsNothingOfItsWarmup) {
  router_.answer = "abcdef";
  ASSERT_EQ(Call({"load", "--streams", "1", "--requests", "3", "--warmup", "1h", "--max-tokens", "4", "--json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["settings"]["warmup_seconds"], 3600);
  EXPECT_EQ(json["requests"]["completed"], 0);
  EXPECT_EQ(json["tokens"]["generated"], 0);
  ASSERT_THAT(router_.generate_requests, SizeIs(3));
  EXPECT_EQ(Call({"load", "--streams", "1", "--warmup", "30s"}), 2);
  EXPECT_THAT(err_, HasSubstr("--warmup 30s leaves nothing to measure of --duration 30s"));
  EXPECT_EQ(Call({"load", "--streams", "1", "--warmup", "0s"}), 2);
}

TEST_F(RwkvctlTest, LoadTakesATraceFromAFileOrStandardInput) {
  const std::string trace =
      "{\"offset\": 0, \"prompt_tokens\": 3, \"max_tokens\": 2, \"session\": \"a\"}\n"
      "{\"offset\": 0.001, \"prompt_tokens\": 4, \"max_tokens\": 1, \"session\": \"a\"}\n";
  EXPECT_EQ(Call({"load", "--trace", "-", "--max-in-flight", "1", "--keep-sessions"}, trace), 0);
  ASSERT_THAT(router_.generate_requests, SizeIs(2));
  EXPECT_EQ(router_.generate_requests[0].session_id(), router_.generate_requests[1].session_id());
  EXPECT_THAT(router_.logs, SizeIs(1));
  const std::string path = WriteFile("trace.jsonl", trace + "{}\n");
  EXPECT_EQ(Call({"load", "--trace", path}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr(path), HasSubstr("line 3"), HasSubstr("offset")));
  EXPECT_EQ(Call({"load", "--trace", path + "x"}), 1);
}

TEST_F(RwkvctlTest, LoadFailsWhenNothingWasCompleted) {
  router_.generate_status = absl::InternalError("not finite");
  EXPECT_EQ(Call({"load", "--streams", "1", "--requests", "2"}), 1);
  EXPECT_THAT(err_, HasSubstr("INTERNAL: no request was completed; the first said: not finite"));
  EXPECT_THAT(out_, HasSubstr("failed: INTERNAL"));
  EXPECT_EQ(Call({"load", "--streams", "1", "--model", "other"}), 1);
  EXPECT_THAT(err_, HasSubstr("no model \"other\" is served"));
}

TEST_F(RwkvctlTest, CtrlCEndsALoadWithItsReport) {
  int tokens = 0;
  router_.on_token = [&](uint64_t) {
    if (++tokens == 5) interrupts_.Interrupt();
  };
  EXPECT_EQ(Call({"load", "--streams", "1", "--duration", "1h", "--max-tokens", "3", "--json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["requests"]["completed"], 1);
  EXPECT_EQ(json["requests"]["interrupted"], 1);
  EXPECT_EQ(json["tokens"]["generated"], 4);
}

}  // namespace
}  // namespace rwkv::rwkvctl
