// What all commands have in common, and the small ones.
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/common/grpc_status.h"
#include "services/rwkvctl/rwkvctl_fixture.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::AllOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;

TEST_F(RwkvctlTest, HelpIsOnStandardOutput) {
  EXPECT_EQ(Call({"--help"}), 0);
  for (const char* command : {"generate", "chat", "sessions", "tokenize", "detokenize", "status", "usage", "eval",
                              "load", "logits", "state", "--router"}) {
    EXPECT_THAT(out_, HasSubstr(command));
  }
  EXPECT_EQ(Call({"-h"}), 0);
  EXPECT_EQ(Call({"help"}), 0);
  EXPECT_EQ(Call({"help", "help"}), 0);
  EXPECT_THAT(out_, HasSubstr("Commands:"));
  EXPECT_EQ(Call({"load", "--help"}), 0);
  const std::string of_load = out_;
  EXPECT_EQ(Call({"help", "load"}), 0);
  EXPECT_EQ(out_, of_load);
  EXPECT_EQ(Call({"generate", "--help"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("--max-tokens N"), HasSubstr("--router"), HasSubstr("finish_reason")));
  EXPECT_EQ(Call({"--help", "sessions"}), 0);
  EXPECT_THAT(out_, HasSubstr("create|list|show|fork|rewind|delete"));
  EXPECT_EQ(connected_, "");
}

TEST_F(RwkvctlTest, WrongUsageIsOneLineAndStatus2) {
  struct Case {
    std::vector<std::string> arguments;
    const char* message;
  };
  const Case kCases[] = {
      {{}, "no command"},
      {{"help", "fly"}, "unknown command \"fly\""},
      {{"help", "load", "status"}, "unexpected argument \"status\""},
      {{"help", "--fly"}, "unknown flag --fly"},
      {{"fly"}, "unknown command \"fly\""},
      {{"--fly"}, "unknown flag --fly"},
      {{"generate", "--fly"}, "unknown flag --fly"},
      {{"generate"}, "--prompt TEXT or --tokens"},
      {{"generate", "--prompt", "a", "--tokens", "1"}, "exclude each other"},
      {{"generate", "--prompt"}, "--prompt needs a value"},
      {{"generate", "--prompt", "a", "stray"}, "unexpected argument \"stray\""},
      {{"generate", "--prompt", "a", "--request-id", "r"}, "--request-id needs --session"},
      {{"generate", "--prompt", "a", "--max-tokens", "-1"}, "--max-tokens"},
      {{"generate", "--prompt", "a", "--temperature", "nan"}, "--temperature"},
      {{"generate", "--prompt", "a", "--temperature", "warm"}, "--temperature"},
      {{"generate", "--prompt", "a", "--seed", "18446744073709551616"}, "--seed"},
      {{"generate", "--prompt", "a", "--logit-bias", "5"}, "--logit-bias"},
      {{"generate", "--prompt", "a", "--logit-bias", "x=1"}, "--logit-bias"},
      {{"generate", "--prompt", "a", "--sampling-order", "random"}, "--sampling-order"},
      {{"generate", "--prompt", "\xFF"}, "UTF-8"},
      {{"generate", "--prompt", "a", "--stop", "\xFF"}, "UTF-8"},
      {{"generate", "--tokens", "1,,2"}, "--tokens"},
      {{"generate", "--router", "nowhere", "--prompt", "a"}, "--router"},
      {{"status", "--router", "h:1,nowhere"}, "\"nowhere\""},
      {{"status", "--router", "h:1,"}, "--router"},
      {{"logits", "--tokens", "1"}, "--out"},
      {{"logits", "--out", "f"}, "--tokens"},
      {{"state", "--out", "f"}, "--session"},
      {{"sessions", "export", "s"}, "FILE is missing"},
      {{"sessions", "export"}, "ID is missing"},
      {{"sessions", "import"}, "FILE is missing"},
      {{"sessions", "import", "f", "g"}, "unexpected argument \"g\""},
      {{"sessions", "import", "f", "--position", "1"}, "takes no --position"},
      {{"state", "--session", "s"}, "--out"},
      {{"sessions"}, "create, list"},
      {{"sessions", "burn"}, "\"burn\""},
      {{"sessions", "show"}, "ID is missing"},
      {{"sessions", "show", "a", "b"}, "unexpected argument \"b\""},
      {{"sessions", "show", ""}, "empty"},
      {{"sessions", "list", "a"}, "unexpected argument \"a\""},
      {{"sessions", "rewind", "a"}, "POSITION is missing"},
      {{"sessions", "rewind", "a", "-1"}, "POSITION"},
      {{"sessions", "create", "a", "--position", "1"}, "takes no --position"},
      {{"sessions", "show", "a", "--new-session", "b"}, "takes no --new-session"},
      {{"eval"}, "what to measure is missing"},
      {{"eval", "speed"}, "\"speed\""},
      {{"eval", "perplexity"}, "one FILE"},
      {{"eval", "perplexity", "a", "b"}, "one FILE"},
      {{"eval", "lambada"}, "one FILE"},
      {{"eval", "needle", "a"}, "--haystack"},
      {{"eval", "needle", "--depth", "101"}, "--depth 101"},
      {{"eval", "needle", "--trials", "0"}, "--trials"},
      {{"eval", "context", "a", "--window-tokens", "0"}, "--window-tokens"},
      {{"eval", "context", "a", "--parallel", "4"}, "--parallel is of lambada and needle, not of context"},
      {{"eval", "perplexity", "a", "--windows", "4"}, "--windows is of context, not of perplexity"},
      {{"eval", "lambada", "a", "--haystack", "b"}, "--haystack is of needle"},
      {{"eval", "lambada", "a", "--parallel", "0"}, "--parallel 0 is not in 1 .. 256"},
      {{"eval", "needle", "--length", "300", "--length", "300"}, "--length 300 is given twice"},
      {{"load"}, "one of --streams N, --rate X and --trace FILE"},
      {{"load", "--streams", "1", "--rate", "1"}, "one of --streams N, --rate X and --trace FILE"},
      {{"load", "--streams", "0"}, "--streams 0 is not in 1 .. 4096"},
      {{"load", "--rate", "0"}, "--rate has to be positive"},
      {{"load", "--rate", "1", "--arrivals", "bursts"}, "\"bursts\""},
      {{"load", "--rate", "1", "--ramp", "5"}, "--ramp"},
      {{"load", "--rate", "1", "--deadline", "-1s"}, "--deadline"},
      {{"load", "--streams", "1", "--ramp", "5s"}, "--arrivals and --ramp are of --rate"},
      {{"load", "--streams", "1", "--max-in-flight", "5"}, "--max-in-flight is of --rate and --trace"},
      {{"load", "--rate", "1", "--max-in-flight", "4097"}, "--max-in-flight 4097"},
      {{"load", "--streams", "1", "--turns", "5"}, "--turns is of --sessions"},
      {{"load", "--streams", "1", "--sessions", "5", "--turns", "0"}, "--turns has to be positive"},
      {{"load", "--streams", "1", "--prompt-tokens", "0"}, "--prompt-tokens"},
      {{"load", "--streams", "1", "--max-tokens", "5..4"}, "--max-tokens"},
      {{"load", "--trace", "f", "--sessions", "5"}, "--trace has lengths and sessions in its file"},
      {{"load", "--streams", "1", "x"}, "unexpected argument"},
      {{"embed"}, "--prompt TEXT or --tokens"},
      {{"embed", "a", "b"}, "more than one text"},
      {{"embed", "a", "--source", "middle"}, "\"middle\""},
      {{"embed", "a", "--tokens", "1"}, "exclude each other"},
      {{"tokenize", "a", "b"}, "more than one text"},
      {{"detokenize", "1", "x"}, "token id 1"},
      {{"status", "x"}, "unexpected argument"},
      {{"chat", "x"}, "unexpected argument"},
  };
  for (const Case& wrong : kCases) {
    EXPECT_EQ(Call(wrong.arguments), 2) << err_;
    EXPECT_THAT(err_, HasSubstr(wrong.message));
    EXPECT_EQ(std::count(err_.begin(), err_.end(), '\n'), 1) << err_;
    EXPECT_EQ(out_, "");
  }
  EXPECT_EQ(connected_, "");
}

TEST_F(RwkvctlTest, FlagsOfTlsReachTheConnection) {
  ASSERT_EQ(Call({"--router=h:1", "--tls-authorities", "ca", "--tls-certificate=c", "--tls-key", "k", "status",
                  "--tls-server-name=router", "--api-key-file", "a"}),
            0);
  EXPECT_EQ(security_.authorities, "ca");
  EXPECT_EQ(security_.certificate, "c");
  EXPECT_EQ(security_.key, "k");
  EXPECT_EQ(security_.server_name, "router");
  EXPECT_EQ(security_.api_key_file, "a");
  connected_.clear();
  for (const char* alone : {"--tls-certificate=c", "--tls-key=k", "--tls-server-name=n", "--api-key-file=a"}) {
    EXPECT_EQ(Call({"--router=h:1", alone, "status"}), 2) << alone;
    EXPECT_THAT(err_, HasSubstr("want --tls-authorities"));
  }
  EXPECT_EQ(connected_, "");
}

TEST_F(RwkvctlTest, ALocalClusterWithTlsIsCalledAsItWants) {
  std::ofstream(Clusters() + "/one", std::ios::app) << "tls_authorities=/d/ca.crt\napi_key_file=/d/api_key\n";
  for (const std::vector<std::string>& call :
       {std::vector<std::string>{"status"}, {"status", "--router=127.0.0.1:4711"}}) {
    security_ = {};
    EXPECT_EQ(Call(call), 0) << err_;
    EXPECT_EQ(security_.authorities, "/d/ca.crt");
    EXPECT_EQ(security_.api_key_file, "/d/api_key");
  }
  // Another cluster gets nothing of it, and flags are the caller's word.
  EXPECT_EQ(Call({"status", "--router=127.0.0.1:4712"}), 0);
  EXPECT_EQ(security_.authorities, "");
  EXPECT_EQ(security_.api_key_file, "");
  EXPECT_EQ(Call({"status", "--tls-authorities=mine"}), 0);
  EXPECT_EQ(security_.authorities, "mine");
  EXPECT_EQ(security_.api_key_file, "");
}

TEST_F(RwkvctlTest, UsageIsThatOfATenant) {
  router_.usage.set_tenant("acme");
  router_.usage.set_turns(3);
  router_.usage.set_prompt_tokens(40);
  router_.usage.set_generated_tokens(50);
  router_.usage.set_stored_bytes(60);
  EXPECT_EQ(Call({"usage"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("acme"), HasSubstr("prompt tokens     40"), HasSubstr("generated tokens  50")));
  EXPECT_EQ(Call({"usage", "--tenant", "zeta", "--json"}), 0);
  const auto json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["tenant"], "zeta");
  EXPECT_EQ(json["turns"], 3);
  EXPECT_EQ(json["stored_bytes"], 60);
  EXPECT_EQ(Call({"usage", "x"}), 2);
}

TEST_F(RwkvctlTest, FlagsMayStandAnywhere) {
  EXPECT_EQ(Call({"--max-tokens", "2", "--json=true", "generate", "--prompt=Hi"}), 0);
  EXPECT_EQ(request().max_tokens(), 2);
  EXPECT_EQ(Call({"--prompt", "generate", "--router", "h:1", "generate", "--max-tokens=3"}), 0);
  EXPECT_EQ(request().text(), "generate");
  EXPECT_EQ(connected_, "h:1");
  EXPECT_EQ(Call({"tokenize", "--", "--json"}), 0);
  EXPECT_EQ(out_, "45 45 106 115 111 110\n");
}

TEST_F(RwkvctlTest, TheClusterThatRunsIsTheDefault) {
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_EQ(connected_, "127.0.0.1:4711");
  std::filesystem::copy(Clusters() + "/one", Clusters() + "/two");
  EXPECT_EQ(Call({"status"}), 1);
  EXPECT_THAT(err_, HasSubstr("2 clusters run here"));
  std::filesystem::remove_all(Clusters());
  EXPECT_EQ(Call({"status"}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("run.sh"), HasSubstr("--router")));
  EXPECT_EQ(Call({"status", "--router", "10.0.0.1:5"}), 0);
  EXPECT_EQ(Call({"status", "--router", "10.0.0.1:5,[::1]:6"}), 0);
}

TEST_F(RwkvctlTest, ErrorsOfCallsAreOneLineAndStatus1) {
  EXPECT_EQ(Call({"generate", "--prompt", ""}), 1);
  EXPECT_EQ(err_, "rwkvctl: INVALID_ARGUMENT: text: is empty\n");
  EXPECT_EQ(Call({"generate", "--tokens", ""}), 1);
  EXPECT_EQ(err_, "rwkvctl: INVALID_ARGUMENT: tokens: is empty\n");
  EXPECT_EQ(Call({"sessions", "show", "nobody"}), 1);
  EXPECT_EQ(err_, "rwkvctl: NOT_FOUND: no session nobody\n");
  router_.generate_status =
      common::WithRetryInfo(absl::ResourceExhaustedError("256 turns\nwait"), absl::Milliseconds(250));
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--max-tokens", "3"}), 1);
  EXPECT_EQ(out_, "Hel");
  EXPECT_EQ(err_, "rwkvctl: RESOURCE_EXHAUSTED: 256 turns wait (retry in 250ms)\n");
}

TEST_F(RwkvctlTest, AFullStandardOutputIsAnError) {
  std::istringstream in;
  std::ostream out(nullptr);  // Takes nothing.
  std::ostringstream err;
  const Environment environment{in,
                                out,
                                err,
                                interrupts_,
                                false,
                                false,
                                false,
                                Clusters(),
                                [this](const std::string&, const common::ClientSecurityOptions&) {
                                  return std::make_unique<router::FakeRouterClient>(&router_);
                                }};
  EXPECT_EQ(rwkvctl::Run({"generate", "--prompt", "Hi"}, environment), 1);
  EXPECT_THAT(err.str(), HasSubstr("cannot write to standard output"));
  EXPECT_EQ(rwkvctl::Run({"status"}, environment), 1);
}

TEST_F(RwkvctlTest, TokenizeAndDetokenize) {
  EXPECT_EQ(Call({"tokenize", "Hi"}), 0);
  EXPECT_EQ(out_, "72 105\n");
  EXPECT_EQ(Call({"tokenize", "--prompt=Hi", "--json"}), 0);
  EXPECT_EQ(out_, "{\"ids\":[72,105]}\n");
  EXPECT_EQ(Call({"tokenize"}, std::string("\xFF\0", 2)), 0);
  EXPECT_EQ(out_, "255 0\n");
  EXPECT_EQ(Call({"tokenize", ""}), 0);
  EXPECT_EQ(out_, "\n");
  EXPECT_EQ(Call({"detokenize", "72", "105,255"}), 0);
  EXPECT_EQ(out_, "Hi\xFF");
  EXPECT_EQ(Call({"detokenize", "--tokens", "72,105", "--json"}), 0);
  EXPECT_EQ(out_, "{\"text\":\"Hi\"}\n");
  EXPECT_EQ(Call({"detokenize"}, "72 105\n"), 0);
  EXPECT_EQ(out_, "Hi");
  router_.has_tokenizer = false;
  EXPECT_EQ(Call({"tokenize", "Hi"}), 1);
  EXPECT_THAT(err_, HasSubstr("FAILED_PRECONDITION"));
}

TEST_F(RwkvctlTest, StatusShowsEveryProcess) {
  router_.status.set_pipeline_state("serving");
  router_.status.mutable_model()->set_name("tiny");
  v1::ProcessStatus* router = router_.status.add_processes();
  router->set_role("router");
  router->set_running_turns(3);
  v1::ProcessStatus* worker = router_.status.add_processes();
  worker->set_role("worker");
  worker->set_name("worker-1");
  worker->set_pid(42);
  worker->set_address("127.0.0.1:9");
  worker->set_health("serving");
  worker->set_stage_index(1);
  worker->set_stage_count(2);
  worker->set_first_layer(6);
  worker->set_end_layer(12);
  v1::ProcessStatus* store = router_.status.add_processes();
  store->set_role("state_store");
  store->set_name("store-0");
  store->set_health("unreachable");
  store->set_message("connection refused");
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("pipeline: serving"), HasSubstr("tiny"), HasSubstr("3 running"),
                          HasSubstr("worker-1"), HasSubstr("42"), HasSubstr("6..11"),
                          // Not in the table, which would be too wide to read.
                          EndsWith("unreachable\n\nstore-0: unreachable: connection refused\n")));
  EXPECT_EQ(Call({"status", "--json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["processes"][1]["pid"], 42);
  EXPECT_EQ(json["processes"][1]["first_layer"], 6);
  EXPECT_EQ(json["processes"][1]["end_layer"], 12);
  EXPECT_EQ(json["processes"][2]["health"], "unreachable");
  EXPECT_FALSE(json["processes"][2].contains("first_layer"));
  EXPECT_EQ(json["model"]["name"], "tiny");
}

TEST_F(RwkvctlTest, StatusWaitsUntilThePipelineServes) {
  int asked = 0;
  router_.on_status = [&]() -> absl::Status {
    if (++asked == 1) return absl::UnavailableError("connection refused");
    router_.status.set_pipeline_state(asked == 2 ? "opening" : "serving");
    return absl::OkStatus();
  };
  EXPECT_EQ(Call({"status", "--wait", "60", "--json"}), 0);
  EXPECT_EQ(asked, 3);
  EXPECT_EQ(nlohmann::json::parse(out_)["pipeline_state"], "serving");

  router_.on_status = nullptr;
  router_.status.set_pipeline_state("no worker answers");
  EXPECT_EQ(Call({"status", "--wait=1"}), 1);
  EXPECT_EQ(err_, "rwkvctl: DEADLINE_EXCEEDED: the cluster does not serve after 1s: no worker answers\n");
  EXPECT_EQ(Call({"status", "--wait=1", "--watch"}), 2);
}

TEST_F(RwkvctlTest, StatusShowsWhoDrivesWhat) {
  router_.status.set_pipeline_state("serving");
  for (const char* name : {"router-0", "router-1"}) {
    v1::ProcessStatus* router = router_.status.add_processes();
    router->set_role("router");
    router->set_name(name);
    router->set_health("serving");
    router->set_running_turns(7);
    router->set_tokens_per_second(12.5);
    v1::LaneStatus* lane = router_.status.add_lanes();
    lane->set_router(name);
    lane->add_workers("w0");
    lane->add_workers("w1");
    lane->set_state("serving");
    lane->set_slots(8);
    lane->set_slots_used(name == absl::string_view("router-0") ? 3 : 5);
  }
  v1::ProcessStatus* spare = router_.status.add_processes();
  spare->set_role("worker");
  spare->set_name("w4");
  spare->set_health("serving");
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_THAT(out_,
              AllOf(HasSubstr("turns:    14 running, 0 waiting, 25.0 tokens/s"), HasSubstr("w0 > w1"), HasSubstr("3/8"),
                    HasSubstr("5/8"), HasSubstr("spare"), HasSubstr("7 running, 0 waiting, 12.5 tokens/s")));
  EXPECT_EQ(Call({"status", "--json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["lanes"][1]["router"], "router-1");
  EXPECT_EQ(json["lanes"][0]["workers"].size(), 2);
  EXPECT_EQ(json["processes"][0]["running_turns"], 7);
}

}  // namespace
}  // namespace rwkv::rwkvctl
