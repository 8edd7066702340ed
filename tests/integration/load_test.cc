// `rwkvctl load` as its users run it: what it counts is what the router's metrics say was served.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/files.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_connection.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::nlohmann::json;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::Runfile;

constexpr absl::Duration kPatience = absl::Seconds(60);

// `rwkvctl load` as a process.
class Load {
 public:
  Load(const LocalCluster& cluster, std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(),
                     {Runfile("services/rwkvctl/rwkvctl"), "load", "--json", "--router", cluster.router_address()});
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_addopen(&files, STDERR_FILENO, err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    EXPECT_EQ(posix_spawn(&pid_, argv[0], &files, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&files);
  }

  void Interrupt() { EXPECT_EQ(kill(pid_, SIGINT), 0); }

  // Its report, when it has ended.
  json Report() {
    int status = 0;
    EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status << " " << testing::ReadFile(err_);
    json report = json::parse(testing::ReadFile(out_), nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(report.is_object()) << testing::ReadFile(out_);
    return report.is_object() ? report : json::object();
  }

 private:
  const std::string out_ = absl::StrCat(::testing::TempDir(), "/load.out");
  const std::string err_ = absl::StrCat(::testing::TempDir(), "/load.err");
  pid_t pid_ = -1;
};

struct Metric {
  absl::string_view name;
  absl::string_view label;
};
constexpr Metric kGenerated = {"rwkv_router_tokens_total", "kind=\"generated\""};
constexpr Metric kPrompt = {"rwkv_router_tokens_total", "kind=\"prompt\""};
constexpr Metric kOverload = {"rwkv_router_errors_total", "cause=\"overload\""};

int64_t Counter(const LocalCluster& cluster, const Metric& metric) {
  const std::string page = testing::HttpGet(cluster.metrics_address("router-0"), "/metrics");
  for (const absl::string_view line : absl::StrSplit(page, '\n')) {
    double value = 0;
    if (absl::StartsWith(line, absl::StrCat(metric.name, "{")) && absl::StrContains(line, metric.label) &&
        absl::SimpleAtod(line.substr(line.rfind(' ') + 1), &value)) {
      return static_cast<int64_t>(value);
    }
  }
  ADD_FAILURE() << "the router has no " << metric.name << " with " << metric.label;
  return -1;
}

std::unique_ptr<LocalCluster> Start(const std::vector<std::string>& router_flags) {
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/load.safetensors");
  options.router_flags = router_flags;
  EXPECT_OK(testing::WriteRandomModel(testing::RandomModelOptions(), options.model));
  auto cluster = LocalCluster::Start(options);
  EXPECT_OK(cluster.status());
  return cluster.ok() ? *std::move(cluster) : nullptr;
}

TEST(LoadTest, CountsTheTokensThatTheRouterServed) {
  const std::unique_ptr<LocalCluster> cluster = Start({});
  ASSERT_NE(cluster, nullptr);
  const std::vector<std::vector<std::string>> kKinds = {
      {"--streams", "4", "--requests", "24", "--prompt-tokens", "1..40", "--max-tokens", "0..30"},
      {"--rate", "100", "--requests", "20", "--prompt-tokens", "5", "--max-tokens", "7", "--temperature", "1"},
      {"--streams", "3", "--requests", "20", "--sessions", "4", "--turns", "3", "--max-tokens", "1..9"},
  };
  for (const std::vector<std::string>& arguments : kKinds) {
    SCOPED_TRACE(absl::StrCat(arguments[0], " ", arguments[4]));
    const int64_t generated = Counter(*cluster, kGenerated);
    const int64_t prompt = Counter(*cluster, kPrompt);
    const json report = Load(*cluster, arguments).Report();
    const int requests = std::stoi(arguments[3]);
    EXPECT_EQ(report["requests"]["completed"], requests);
    EXPECT_EQ(report["requests"]["failed"], 0) << report;
    EXPECT_EQ(report["tokens"]["generated"], Counter(*cluster, kGenerated) - generated);
    // In a session the token before the input, whose logits nobody asked for, may have been fed with it.
    const int64_t fed = Counter(*cluster, kPrompt) - prompt;
    EXPECT_LE(report["tokens"]["prompt"], fed);
    EXPECT_LE(fed, report["tokens"]["prompt"].get<int64_t>() + (arguments[4] == "--sessions" ? requests : 0));
    EXPECT_EQ(report["end_to_end_seconds"]["count"], requests);
    EXPECT_GT(report["ttft_seconds"]["p50"], 0.0);
    EXPECT_GT(report["tokens"]["generated_per_second"], 0.0);
  }
}

TEST(LoadTest, CountsWhatTheRouterRefusedAndTriesAgainWhenAsked) {
  const std::unique_ptr<LocalCluster> cluster = Start({"--max_running=1", "--max_waiting=0"});
  ASSERT_NE(cluster, nullptr);
  const std::vector<std::string> arguments = {"--streams", "4", "--requests", "12", "--max-tokens", "20"};
  const int64_t before = Counter(*cluster, kOverload);
  const json failing = Load(*cluster, arguments).Report();
  EXPECT_GT(failing["requests"]["refusals"], 0);
  EXPECT_EQ(failing["requests"]["refusals"], Counter(*cluster, kOverload) - before);
  EXPECT_EQ(failing["errors"]["RESOURCE_EXHAUSTED"], failing["requests"]["refusals"]);
  EXPECT_EQ(failing["requests"]["completed"].get<int>() + failing["requests"]["failed"].get<int>(), 12);

  std::vector<std::string> patient = arguments;
  patient.push_back("--retry");
  const json retrying = Load(*cluster, patient).Report();
  EXPECT_GT(retrying["requests"]["refusals"], 0);
  EXPECT_EQ(retrying["requests"]["completed"], 12);
  EXPECT_EQ(retrying["requests"]["failed"], 0);
}

TEST(LoadTest, CtrlCEndsItWithItsReport) {
  const std::unique_ptr<LocalCluster> cluster = Start({});
  ASSERT_NE(cluster, nullptr);
  Load load(*cluster, {"--streams", "2", "--duration", "1h", "--max-tokens", "100000"});
  ASSERT_TRUE(testing::WaitUntil([&] { return Counter(*cluster, kGenerated) >= 10; }, kPatience));
  load.Interrupt();
  const json report = load.Report();
  EXPECT_EQ(report["requests"]["interrupted"], 2);
  EXPECT_EQ(report["requests"]["failed"], 0);
  EXPECT_GT(report["tokens"]["generated"], 0);
}

}  // namespace
}  // namespace rwkv
