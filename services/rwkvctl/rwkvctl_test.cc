// Whole command lines against a router in memory.
#include "services/rwkvctl/rwkvctl.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/checkpoint/session_state.h"
#include "services/common/grpc_status.h"
#include "services/common/security/security.h"
#include "services/router/client/fake_router_client.h"
#include "services/rwkvctl/local_clusters.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

class FakeInterrupts : public Interrupts {
 public:
  void SetHandler(std::function<void()> handler) override { handler_ = std::move(handler); }
  bool has_handler() const { return handler_ != nullptr; }
  void Interrupt() { handler_(); }

 private:
  std::function<void()> handler_;
};

// What a request feeds, as bytes: the fake's ids.
std::string Fed(const v1::GenerateRequest& request) {
  return request.has_text() ? request.text()
                            : std::string(request.tokens().ids().begin(), request.tokens().ids().end());
}

// A session's text, after the end of text that it begins with.
std::string Begun(const std::string& text) { return std::string(1, '\0') + text; }

class RwkvctlTest : public ::testing::Test {
 protected:
  RwkvctlTest()
      : folder_(std::filesystem::path(::testing::TempDir()) /
                ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(Clusters());
    std::ofstream(Clusters() + "/one") << "router=127.0.0.1:4711\npid=" << getpid()
                                       << "\nstarted=" << StartTicks(getpid()) << "\n";
  }
  ~RwkvctlTest() override { std::filesystem::remove_all(folder_); }

  std::string Clusters() const { return (folder_ / "clusters").string(); }

  // Exit status; out_ and err_ are what was printed.
  int Call(const std::vector<std::string>& arguments, const std::string& input = "") {
    std::istringstream in(input);
    std::ostringstream out, err;
    const Environment environment{in,
                                  out,
                                  err,
                                  interrupts_,
                                  terminal_,
                                  terminal_,
                                  terminal_,
                                  Clusters(),
                                  [this](const std::string& address, const common::ClientSecurityOptions& security) {
                                    connected_ = address;
                                    security_ = security;
                                    return std::make_unique<router::FakeRouterClient>(&router_);
                                  }};
    const int status = rwkvctl::Run(arguments, environment);
    out_ = out.str();
    err_ = err.str();
    EXPECT_FALSE(interrupts_.has_handler());
    if (status == 0) {
      EXPECT_TRUE(terminal_ || err_.empty() || absl::StartsWith(err_, "session ")) << err_;
    } else {
      EXPECT_THAT(err_, AllOf(HasSubstr("rwkvctl: "), EndsWith("\n")));
    }
    return status;
  }

  // Its path.
  std::string WriteFile(const std::string& name, const std::string& content) const {
    const std::string path = (folder_ / name).string();
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  const v1::GenerateRequest& request() const { return router_.generate_requests.back(); }

  const std::filesystem::path folder_;
  router::FakeRouterClient::State router_;
  FakeInterrupts interrupts_;
  bool terminal_ = false;
  std::string out_, err_;
  std::string connected_;
  common::ClientSecurityOptions security_;
};

TEST_F(RwkvctlTest, HelpIsOnStandardOutput) {
  EXPECT_EQ(Call({"--help"}), 0);
  for (const char* command : {"generate", "chat", "sessions", "tokenize", "detokenize", "status", "usage", "eval",
                              "load", "logits", "state", "--router"}) {
    EXPECT_THAT(out_, HasSubstr(command));
  }
  EXPECT_EQ(Call({"-h"}), 0);
  EXPECT_EQ(Call({"help"}), 0);
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

TEST_F(RwkvctlTest, GenerateStreamsTextAsItIs) {
  router_.answer = "Hello,\nworld";
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--max-tokens", "12"}), 0);
  EXPECT_EQ(out_, "Hello,\nworld");
  EXPECT_EQ(request().text(), "Hi");
  EXPECT_FALSE(request().has_tokens());
  EXPECT_EQ(request().session_id(), "");
  EXPECT_EQ(request().request_id(), "");
  terminal_ = true;
  EXPECT_EQ(Call({"generate", "--prompt", "Hi"}), 0);
  EXPECT_EQ(out_, "Hello,\nworld\n");
}

TEST_F(RwkvctlTest, GenerateSendsEveryFlag) {
  router_.logs["s"] = {};
  router_.turns[{"s", "r"}] = {{1, 2}, "Hello.", {'H'}, false};  // Of which the first token was received.
  EXPECT_EQ(Call({"generate",
                  "--model",
                  "m",
                  "--session",
                  "s",
                  "--request-id",
                  "r",
                  "--tokens",
                  "1,2",
                  "--max-tokens",
                  "3",
                  "--temperature",
                  "0.5",
                  "--top-k",
                  "-7",
                  "--top-p",
                  "0.25",
                  "--min-p",
                  "0.125",
                  "--typical-p",
                  "0.75",
                  "--presence-penalty",
                  "-1",
                  "--frequency-penalty",
                  "2",
                  "--penalty-decay",
                  "0.5",
                  "--repetition-penalty",
                  "1.5",
                  "--penalize-prompt",
                  "--logit-bias",
                  "7=-inf",
                  "--logit-bias",
                  "5=-1.5",
                  "--logit-bias",
                  "6=2",
                  "--sampling-order",
                  "rwkv-pip",
                  "--seed",
                  "18446744073709551615",
                  "--stop",
                  "a",
                  "--stop",
                  "b",
                  "--stop-token",
                  "9",
                  "--stop-token",
                  "8",
                  "--ignore-eos",
                  "--logprobs",
                  "2",
                  "--resume-from",
                  "1",
                  "--json"}),
            0);
  EXPECT_EQ(request().model(), "m");
  EXPECT_EQ(request().session_id(), "s");
  EXPECT_EQ(request().request_id(), "r");
  EXPECT_THAT(request().tokens().ids(), ElementsAre(1, 2));
  EXPECT_EQ(request().max_tokens(), 3);
  const v1::Sampling& sampling = request().sampling();
  EXPECT_EQ(sampling.temperature(), 0.5f);
  EXPECT_EQ(sampling.top_k(), -7);  // The router says what is wrong with it.
  EXPECT_EQ(sampling.top_p(), 0.25f);
  EXPECT_EQ(sampling.min_p(), 0.125f);
  EXPECT_EQ(sampling.typical_p(), 0.75f);
  EXPECT_EQ(sampling.presence_penalty(), -1);
  EXPECT_EQ(sampling.frequency_penalty(), 2);
  EXPECT_EQ(sampling.penalty_decay(), 0.5f);
  EXPECT_EQ(sampling.repetition_penalty(), 1.5f);
  EXPECT_TRUE(sampling.penalize_prompt());
  EXPECT_EQ(sampling.logit_bias().at(7), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(sampling.logit_bias().at(5), -1.5f);
  EXPECT_EQ(sampling.logit_bias().at(6), 2);
  EXPECT_EQ(sampling.order(), v1::SAMPLING_ORDER_RWKV_PIP);
  EXPECT_EQ(sampling.seed(), 18446744073709551615u);
  EXPECT_EQ(sampling.top_logprobs(), 2);
  EXPECT_THAT(request().stop(), ElementsAre("a", "b"));
  EXPECT_THAT(request().stop_token_ids(), ElementsAre(9, 8));
  EXPECT_TRUE(request().ignore_end_of_text());
  EXPECT_EQ(request().resume_from(), 1);
}

TEST_F(RwkvctlTest, GenerateLeavesUnsetWhatIsNotGiven) {
  EXPECT_EQ(Call({"generate", "--prompt", "Hi"}), 0);
  EXPECT_FALSE(request().has_max_tokens());
  const v1::Sampling& sampling = request().sampling();
  EXPECT_FALSE(sampling.has_temperature() || sampling.has_top_k() || sampling.has_top_p() || sampling.has_seed());
}

TEST_F(RwkvctlTest, GenerateJsonIsAnObjectATokenAndALastOne) {
  router_.answer = "ab";
  router_.logs["s"] = {};
  EXPECT_EQ(Call({"generate", "--json", "--prompt", "Hi", "--session", "s", "--max-tokens", "2", "--logprobs", "1",
                  "--seed", "5"}),
            0);
  std::vector<nlohmann::json> lines;
  for (absl::string_view line : absl::StrSplit(out_, '\n', absl::SkipEmpty())) {
    lines.push_back(nlohmann::json::parse(line.begin(), line.end()));
  }
  ASSERT_THAT(lines, SizeIs(3));
  EXPECT_EQ(lines[0],
            nlohmann::json::parse(
                R"({"index": 0, "id": 97, "text": "a", "logprob": -0.5, "top_logprobs": [{"id": 0, "logprob": 0}]})"));
  EXPECT_EQ(lines[1]["index"], 1);
  EXPECT_EQ(lines[2]["finish_reason"], "length");
  EXPECT_EQ(lines[2]["prompt_tokens"], 2);
  EXPECT_EQ(lines[2]["generated_tokens"], 2);
  EXPECT_EQ(lines[2]["session_tokens"], 4);
  EXPECT_EQ(lines[2]["session_id"], "s");
  EXPECT_EQ(lines[2]["seed"], 5);
  EXPECT_EQ(lines[2]["queue_seconds"], 0.001);
  EXPECT_EQ(lines[2]["prefill_seconds"], 0.25);
  EXPECT_EQ(lines[2]["decode_seconds"], 1);
}

TEST_F(RwkvctlTest, GenerateNamesTheTurnsOfASessionSoThatTheyCanBeResumed) {
  router_.logs["s"] = {};
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--session", "s"}), 0);
  const std::string first = request().request_id();
  EXPECT_THAT(first, SizeIs(32));
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--session", "s"}), 0);
  EXPECT_NE(request().request_id(), first);
}

TEST_F(RwkvctlTest, GenerateWithoutAPromptGoesOnWithTheSession) {
  router_.answer = "Hello there.";
  router_.logs["s"] = {};
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--session", "s", "--max-tokens", "5"}), 0);
  EXPECT_EQ(out_, "Hello");
  EXPECT_EQ(Call({"generate", "--session", "s", "--max-tokens", "3"}), 0);
  EXPECT_EQ(out_, " th");
  EXPECT_EQ(request().input_case(), v1::GenerateRequest::INPUT_NOT_SET);
  EXPECT_EQ(Call({"generate", "--session", "s", "--prompt", ""}), 0);
  EXPECT_EQ(out_, "ere.");
  const std::vector<uint32_t>& log = router_.logs["s"];
  EXPECT_EQ(std::string(log.begin(), log.end()), "HiHello there.");
  EXPECT_EQ(Call({"generate"}), 2);
  EXPECT_EQ(Call({"generate", "--session", "s", "--template=world"}), 1);
}

TEST_F(RwkvctlTest, GeneratePrintsIdsWhereThereIsNoText) {
  router_.answer = "ab";
  router_.has_tokenizer = false;
  EXPECT_EQ(Call({"generate", "--tokens", "1,2"}), 0);
  EXPECT_EQ(out_, "97 98\n");
  router_.has_tokenizer = true;
  EXPECT_EQ(Call({"generate", "--tokens", "1,2"}), 0);
  EXPECT_EQ(out_, "ab");
}

TEST_F(RwkvctlTest, GenerateReadsAPromptFromStandardInput) {
  EXPECT_EQ(Call({"generate", "--prompt", "-"}, "two\nlines\n"), 0);
  EXPECT_EQ(request().text(), "two\nlines\n");
  EXPECT_EQ(Call({"generate", "--prompt", "-"}, "bad \xFF"), 1);
  EXPECT_THAT(err_, HasSubstr("UTF-8"));
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

TEST_F(RwkvctlTest, LogitsWritesAMatrix) {
  const std::string path = (folder_ / "l.npy").string();
  EXPECT_EQ(Call({"logits", "--tokens", "1,2,3", "--out", path}), 0);
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  EXPECT_THAT(content, HasSubstr("'shape': (3, 4), "));
  ASSERT_EQ(content.size(), 128 + 3 * 4 * sizeof(float));
  float last = 0;
  std::memcpy(&last, content.data() + content.size() - sizeof(last), sizeof(last));
  EXPECT_EQ(last, 3.75f);
}

TEST_F(RwkvctlTest, LogitsFailsWhereItCannotWrite) {
  EXPECT_EQ(Call({"logits", "--tokens", "1", "--out", (folder_ / "no" / "l.npy").string()}), 1);
  EXPECT_THAT(err_, HasSubstr("no/l.npy"));
}

TEST_F(RwkvctlTest, StateWritesSafetensors) {
  router_.logs["s"] = {1, 2};
  v1::SessionsExportStateResponse piece;
  piece.set_tensor("blocks.0.att.x_prev");
  piece.add_shape(2);
  piece.set_data(std::string("\0\0\x80\x3f\0\0\0\x40", 8));
  piece.set_position(2);
  router_.exported_state = {piece};
  const std::string path = (folder_ / "s.safetensors").string();
  EXPECT_EQ(Call({"state", "--session", "s", "--out", path}), 0);
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, content.data(), sizeof(header_bytes));
  const nlohmann::json header = nlohmann::json::parse(content.substr(8, header_bytes));
  EXPECT_EQ(header["__metadata__"]["position"], "2");
  EXPECT_EQ(header["blocks.0.att.x_prev"]["shape"], nlohmann::json({2}));
  EXPECT_THAT(content, EndsWith(piece.data()));

  v1::SessionsExportStateResponse later = piece;
  later.set_tensor("blocks.0.ffn.x_prev");
  later.set_position(3);
  router_.exported_state.push_back(later);
  const std::string torn = (folder_ / "torn.safetensors").string();
  EXPECT_EQ(Call({"state", "--session", "s", "--out", torn}), 1);
  EXPECT_THAT(err_, HasSubstr("position changes from 2 to 3"));
  EXPECT_FALSE(std::filesystem::exists(torn));
}

v1::SessionsExportStateResponse StatePiece(uint64_t position) {
  v1::SessionsExportStateResponse piece;
  piece.set_tensor("blocks.0.att.x_prev");
  piece.add_shape(2);
  piece.set_data(std::string("\0\0\x80\x3f\0\0\0\x40", 8));
  piece.set_position(position);
  piece.set_model_fingerprint("abcd");
  return piece;
}

std::string ReadWhole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string{std::istreambuf_iterator<char>(file), {}};
}

nlohmann::json HeaderOf(const std::string& content) {
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, content.data(), sizeof(header_bytes));
  return nlohmann::json::parse(content.substr(8, header_bytes));
}

TEST_F(RwkvctlTest, ASessionIsExportedWithItsTokensAndImportedAsItIs) {
  router_.logs["s"].assign(8195, 7);  // Two calls to read.
  router_.logs["s"].back() = 9;
  router_.initial_states["s"] = "poet@12345678";
  router_.exported_state = {StatePiece(8195)};
  const std::string path = (folder_ / "s.safetensors").string();
  EXPECT_EQ(Call({"sessions", "export", "s", path}), 0) << err_;
  const std::string content = ReadWhole(path);
  EXPECT_EQ(out_, absl::StrCat("exported session s at position 8195 to ", path, ", ", content.size(),
                               " bytes, with its tokens\n"));
  const nlohmann::json header = HeaderOf(content);
  EXPECT_EQ(header["token_ids"]["dtype"], "I32");
  EXPECT_EQ(header["token_ids"]["shape"], nlohmann::json({8195}));
  const std::map<std::string, std::string> metadata = header["__metadata__"];
  const std::string payload = StatePiece(0).data() + [] {
    std::string bytes;
    for (int i = 0; i < 8195; ++i) bytes += std::string(i == 8194 ? "\x09\0\0\0" : "\x07\0\0\0", 4);
    return bytes;
  }();
  EXPECT_THAT(content, EndsWith(payload));
  EXPECT_EQ(metadata, (std::map<std::string, std::string>{{"position", "8195"},
                                                          {"session", "s"},
                                                          {"model_fingerprint", "abcd"},
                                                          {"initial_state", "poet@12345678"},
                                                          {"xxh3", checkpoint::SessionStateChecksum({payload})}}));

  EXPECT_EQ(Call({"sessions", "import", path}), 0) << err_;
  EXPECT_EQ(out_, "session-2\n");
  EXPECT_EQ(err_, "");
  EXPECT_EQ(Call({"sessions", "import", path, "--session", "mine", "--json"}), 0) << err_;
  EXPECT_EQ(nlohmann::json::parse(out_)["id"], "mine");
  EXPECT_THAT(router_.imported_files, ::testing::ElementsAre(content, content));
  EXPECT_EQ(Call({"sessions", "import", path, "--session", "mine"}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("ALREADY_EXISTS"), HasSubstr(path)));
  EXPECT_EQ(Call({"sessions", "import", path + ".no"}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("NOT_FOUND"), HasSubstr(path + ".no")));
}

TEST_F(RwkvctlTest, WhatStandsOnAnImportedStateIsSaidAndHasNoLogToExport) {
  router_.bases["t"] = 5;
  const std::string path = (folder_ / "t.pth").string();
  std::ofstream(path) << "bytes";
  EXPECT_EQ(Call({"sessions", "import", path, "--session=t"}), 0) << err_;
  EXPECT_THAT(err_, HasSubstr("cannot be forked or rewound to before position 5"));
  EXPECT_EQ(Call({"sessions", "show", "t"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("base_position: 5\n"), HasSubstr("log_begin: 5\n")));
  router_.exported_state = {StatePiece(5)};
  const std::string again = (folder_ / "again.safetensors").string();
  EXPECT_EQ(Call({"sessions", "export", "t", again, "--json"}), 0) << err_;
  EXPECT_EQ(nlohmann::json::parse(out_)["has_log"], false);
  EXPECT_FALSE(HeaderOf(ReadWhole(again)).contains("token_ids"));
}

TEST_F(RwkvctlTest, AnExportOfASessionThatGoesOnMeanwhileWritesNothing) {
  router_.logs["s"] = {1, 2};
  router_.exported_state = {StatePiece(2)};
  router_.on_export = [this] { router_.logs["s"].push_back(3); };
  const std::string path = (folder_ / "s.safetensors").string();
  EXPECT_EQ(Call({"sessions", "export", "s", path}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("ABORTED"), HasSubstr("went on while it was exported")));
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(RwkvctlTest, SessionsAreCreatedListedShownForkedRewoundAndDeleted) {
  EXPECT_EQ(Call({"sessions", "create"}), 0);
  EXPECT_EQ(out_, "session-1\n");
  EXPECT_EQ(Call({"sessions", "create", "mine"}), 0);
  EXPECT_EQ(out_, "mine\n");
  EXPECT_EQ(Call({"sessions", "create", "--session", "mine"}), 1);
  EXPECT_THAT(err_, HasSubstr("ALREADY_EXISTS"));
  EXPECT_EQ(Call({"generate", "--session", "mine", "--prompt", "Hi", "--max-tokens", "3"}), 0);

  EXPECT_EQ(Call({"sessions", "fork", "mine", "4", "--new-session", "theirs"}), 0);
  EXPECT_EQ(out_, "theirs\n");
  EXPECT_EQ(Call({"sessions", "fork", "--session=mine"}), 0);
  EXPECT_EQ(out_, "mine-fork\n");
  EXPECT_EQ(Call({"sessions", "rewind", "theirs", "--position", "1"}), 0);
  EXPECT_EQ(out_, "rewound to 1 tokens: session theirs\n");
  EXPECT_EQ(Call({"sessions", "rewind", "theirs", "9"}), 1);
  EXPECT_THAT(err_, HasSubstr("OUT_OF_RANGE"));

  // Four sessions over two pages.
  EXPECT_EQ(Call({"sessions", "list"}), 0);
  EXPECT_THAT(out_, AllOf(StartsWith("SESSION"), HasSubstr("mine "), HasSubstr("mine-fork "), HasSubstr("session-1 "),
                          HasSubstr("theirs ")));
  EXPECT_EQ(Call({"sessions", "list", "--json"}), 0);
  const nlohmann::json listed = nlohmann::json::parse(out_);
  ASSERT_THAT(listed, SizeIs(4));
  EXPECT_EQ(listed[0]["id"], "mine");
  EXPECT_EQ(listed[0]["tokens"], 5);

  EXPECT_EQ(Call({"sessions", "show", "mine", "--log", "--text"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("id: mine\n"), HasSubstr("tokens: 5\n"),
                          HasSubstr("token_ids: 72 105 72 101 108\n"), HasSubstr("text:\nHiHel\n")));
  EXPECT_EQ(Call({"sessions", "show", "mine", "--json", "--log"}), 0);
  EXPECT_EQ(nlohmann::json::parse(out_)["token_ids"], nlohmann::json({72, 105, 72, 101, 108}));

  EXPECT_EQ(Call({"sessions", "delete", "mine", "theirs"}), 0);
  EXPECT_EQ(out_, "deleted session mine\ndeleted session theirs\n");
  EXPECT_EQ(Call({"sessions", "delete", "mine"}), 1);
  EXPECT_THAT(err_, HasSubstr("NOT_FOUND"));
}

TEST_F(RwkvctlTest, WhatBeginsWithATunedStateNamesIt) {
  EXPECT_EQ(Call({"sessions", "create", "mine", "--initial-state", "poet"}), 0);
  EXPECT_EQ(router_.initial_states["mine"], "poet");
  EXPECT_EQ(Call({"sessions", "show", "mine"}), 0);
  EXPECT_THAT(out_, HasSubstr("initial_state: poet\n"));
  EXPECT_EQ(Call({"sessions", "create", "plain"}), 0);
  EXPECT_EQ(Call({"sessions", "show", "plain"}), 0);
  EXPECT_THAT(out_, Not(HasSubstr("initial_state")));
  EXPECT_EQ(Call({"sessions", "fork", "mine", "--initial-state", "poet"}), 2);
  EXPECT_THAT(err_, HasSubstr("fork takes no --initial-state"));
  EXPECT_EQ(Call({"generate", "--initial-state", "judge", "--prompt", "Hi"}), 0);
  EXPECT_EQ(request().initial_state(), "judge");
  EXPECT_EQ(Call({"chat", "--initial-state", "poet"}, "Hi\n"), 0);
  EXPECT_EQ(router_.initial_states[request().session_id()], "poet");
  EXPECT_EQ(Call({"chat", "--session", "mine", "--initial-state", "poet"}, "Hi\n"), 2);
  EXPECT_THAT(err_, HasSubstr("--initial-state is for a new session"));
  router_.status.mutable_model()->add_initial_states("judge@9abcdef0");
  router_.status.mutable_model()->add_initial_states("poet@12345678");
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_THAT(out_, HasSubstr("states:   judge@9abcdef0, poet@12345678\n"));
  EXPECT_EQ(Call({"status", "--json"}), 0);
  EXPECT_EQ(nlohmann::json::parse(out_)["model"]["initial_states"][1], "poet@12345678");
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
  router_.status.set_running_turns(3);
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
  store->set_health("unreachable");
  store->set_message("connection refused");
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_THAT(out_,
              AllOf(HasSubstr("pipeline: serving"), HasSubstr("tiny"), HasSubstr("3 running"), HasSubstr("worker-1"),
                    HasSubstr("42"), HasSubstr("6..11"), HasSubstr("unreachable: connection refused")));
  EXPECT_EQ(Call({"status", "--json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["processes"][0]["pid"], 42);
  EXPECT_EQ(json["processes"][0]["first_layer"], 6);
  EXPECT_EQ(json["processes"][0]["end_layer"], 12);
  EXPECT_EQ(json["processes"][1]["health"], "unreachable");
  EXPECT_FALSE(json["processes"][1].contains("first_layer"));
  EXPECT_EQ(json["model"]["name"], "tiny");
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
    lane->set_slots_used(3);
  }
  v1::ProcessStatus* spare = router_.status.add_processes();
  spare->set_role("worker");
  spare->set_name("w4");
  spare->set_health("serving");
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("w0 > w1"), HasSubstr("3/8"), HasSubstr("-/8"), HasSubstr("spare"),
                          HasSubstr("7 running, 0 waiting, 12.5 tokens/s")));
  EXPECT_EQ(Call({"status", "--json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json["lanes"][1]["router"], "router-1");
  EXPECT_EQ(json["lanes"][0]["workers"].size(), 2);
  EXPECT_EQ(json["processes"][0]["running_turns"], 7);
}

TEST_F(RwkvctlTest, ChatKeepsItsSessionAndItsTemplate) {
  router_.answer = " Hello.";
  EXPECT_EQ(Call({"chat"}, "Hi\n\nWho are you?\n/exit\nnot read\n"), 0);
  EXPECT_EQ(err_, "session session-1\n");
  EXPECT_EQ(out_, "Hello.\nHello.\n");
  ASSERT_THAT(router_.generate_requests, SizeIs(2));
  EXPECT_EQ(Fed(router_.generate_requests[0]), Begun("User: Hi\n\nAssistant:"));
  EXPECT_THAT(router_.generate_requests[0].stop(), ElementsAre("\n\nUser:"));
  EXPECT_TRUE(router_.tokenize_requests.back().plain_text() && router_.generate_requests[1].plain_text());
  // The fake left the stop string in the session, as the router does: only the rest is fed.
  EXPECT_EQ(router_.generate_requests[1].text(), " Who are you?\n\nAssistant:");
  EXPECT_EQ(router_.generate_requests[1].session_id(), "session-1");
  EXPECT_NE(router_.generate_requests[0].request_id(), router_.generate_requests[1].request_id());
  const std::vector<uint32_t>& log = router_.logs["session-1"];
  EXPECT_EQ(std::string(log.begin(), log.end()),
            Begun("User: Hi\n\nAssistant: Hello.\n\nUser: Who are you?\n\nAssistant: Hello.\n\nUser:"));
}

TEST_F(RwkvctlTest, ChatGoesOnWithASessionHoweverItEnded) {
  const std::string end = "User: Hi\n\nAssistant: cut in the mid";
  router_.logs["s"] = std::vector<uint32_t>(end.begin(), end.end());
  EXPECT_EQ(Call({"chat", "--session", "s"}, "More\n"), 0);
  EXPECT_EQ(request().text(), "\n\nUser: More\n\nAssistant:");
  EXPECT_EQ(Call({"chat", "--session", "nobody"}, "More\n"), 1);
  EXPECT_THAT(err_, HasSubstr("NOT_FOUND"));
}

TEST_F(RwkvctlTest, EvalPerplexityFeedsOneDocumentAfterIdZero) {
  const std::string path = WriteFile("text", "abcd\xff");
  EXPECT_EQ(Call({"eval", "perplexity", path, "--json"}), 0);
  ASSERT_THAT(router_.documents, SizeIs(1));
  EXPECT_THAT(router_.documents[0].token_ids(), ElementsAre(0));
  EXPECT_EQ(router_.documents[0].text(), "abcd\xff");
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json.size(), 5);
  EXPECT_EQ(json["tokens"], 5);
  EXPECT_EQ(json["bytes"], 5);
  const double nats = ('a' + 'b' + 'c' + 'd' + 4 + 256) / 256.0;
  EXPECT_NEAR(json["nats_per_token"].get<double>(), nats / 5, 1e-9);
  EXPECT_NEAR(json["perplexity"].get<double>(), std::exp(nats / 5), 1e-9);
  EXPECT_NEAR(json["bits_per_byte"].get<double>(), nats / 5 / std::log(2.0), 1e-9);
  EXPECT_EQ(Call({"eval", "perplexity", "-", "--json"}, "abcd\xff"), 0);
  EXPECT_EQ(nlohmann::json::parse(out_), json);

  EXPECT_EQ(Call({"eval", "perplexity", path}), 0);
  EXPECT_THAT(out_, HasSubstr("BITS/BYTE"));
  EXPECT_THAT(out_, HasSubstr("0.5109"));
  terminal_ = true;
  EXPECT_EQ(Call({"eval", "perplexity", path}), 0);
  EXPECT_THAT(err_, AllOf(HasSubstr("60 %"), HasSubstr("100 %"), EndsWith("\r\x1b[K")));
}

TEST_F(RwkvctlTest, EvalSaysWhatIsWrongWithTheText) {
  EXPECT_EQ(Call({"eval", "perplexity", (folder_ / "none").string()}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("NOT_FOUND"), HasSubstr("none")));
  EXPECT_EQ(Call({"eval", "perplexity", WriteFile("empty", "")}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("empty is empty")));
  EXPECT_EQ(Call({"eval", "perplexity", "-"}), 1);
  EXPECT_THAT(err_, HasSubstr("standard input is empty"));
  EXPECT_EQ(Call({"eval", "perplexity", folder_.string()}), 1);
  EXPECT_THAT(err_, HasSubstr(": Is a directory"));
  router_.has_tokenizer = false;
  EXPECT_EQ(Call({"eval", "perplexity", WriteFile("text", "a")}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("FAILED_PRECONDITION"), HasSubstr("no tokenizer")));
}

TEST_F(RwkvctlTest, EvalPrintsATableOrOneObject) {
  struct Case {
    std::vector<std::string> arguments;
    const char* table;
    const char* key;
  };
  const std::string lambada = WriteFile("lambada.jsonl", "{\"text\": \"Say Hello.\"}\n");
  const std::string text = WriteFile("text", std::string(200, 'a'));
  const Case kCases[] = {
      {{"eval", "lambada", lambada, "--parallel", "1"}, "ACCURACY", "accuracy"},
      {{"eval", "context", text, "--window-tokens", "100"}, "POSITIONS", "rise_nats"},
      {{"eval", "needle", "--length", "400", "--depth", "50", "--parallel", "1"}, "DEPTH 50 %", "accuracy"},
      {{"eval", "needle", "--haystack", text, "--length", "400", "--trials", "1", "--parallel", "1"},
       "DEPTH 100 %",
       "cells"},
  };
  for (Case run : kCases) {
    EXPECT_EQ(Call(run.arguments), 0) << err_;
    EXPECT_THAT(out_, HasSubstr(run.table));
    run.arguments.push_back("--json");
    EXPECT_EQ(Call(run.arguments), 0) << err_;
    EXPECT_TRUE(nlohmann::json::parse(out_).contains(run.key)) << out_;
    EXPECT_EQ(std::count(out_.begin(), out_.end(), '\n'), 1);
  }
  EXPECT_EQ(Call({"eval", "lambada", text}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("text: line 1"), HasSubstr("INVALID_ARGUMENT")));
}

TEST_F(RwkvctlTest, EvalBeginsEveryTextWithTheTunedStateItNames) {
  const std::string lambada = WriteFile("lambada.jsonl", "{\"text\": \"Say Hello.\"}\n");
  const std::string text = WriteFile("text", std::string(200, 'a'));
  EXPECT_EQ(Call({"eval", "lambada", lambada, "--parallel", "1", "--initial-state", "poet"}), 0) << err_;
  EXPECT_EQ(Call({"eval", "context", text, "--window-tokens", "100", "--initial-state", "poet"}), 0) << err_;
  EXPECT_EQ(Call({"eval", "perplexity", text, "--initial-state", "poet"}), 0) << err_;
  EXPECT_EQ(Call({"eval", "needle", "--length", "400", "--parallel", "1", "--initial-state", "poet"}), 0) << err_;
  EXPECT_THAT(router_.generate_requests, SizeIs(1 + 15));
  EXPECT_THAT(router_.score_requests, SizeIs(1));
  EXPECT_THAT(router_.documents, SizeIs(2 + 1));
  for (const auto& request : router_.generate_requests) EXPECT_EQ(request.initial_state(), "poet");
  for (const auto& request : router_.score_requests) EXPECT_EQ(request.initial_state(), "poet");
  for (const auto& document : router_.documents) EXPECT_EQ(document.initial_state(), "poet");
}

TEST_F(RwkvctlTest, EmbedPrintsOneVector) {
  EXPECT_EQ(Call({"embed", "abc"}), 0);
  EXPECT_EQ(out_, "97 99 0\n");
  EXPECT_EQ(Call({"embed", "--tokens", "5,6", "--source", "hidden-mean", "--normalize"}), 0);
  EXPECT_EQ(out_, "2.5 3 1\n");
  EXPECT_EQ(Call({"embed", "--prompt", "-", "--source=state", "--json"}, "xy"), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_THAT(json["values"], ElementsAre(120, 121, 3));
  EXPECT_EQ(json["prompt_tokens"], 2);
}

TEST_F(RwkvctlTest, ChatTakesMessagesOfSeveralLines) {
  EXPECT_EQ(Call({"chat"}, "\"\"\"\nfirst\n\nsecond \r\n\"\"\"\n"), 0);
  EXPECT_EQ(Fed(request()), Begun("User: first\nsecond\n\nAssistant:"));
}

TEST_F(RwkvctlTest, ChatTakesTheModelsTemplateOrTheOneGiven) {
  router_.chat_template = "raven";
  EXPECT_EQ(Call({"chat"}, "Hi\n"), 0);
  EXPECT_EQ(request().text(), "Bob: Hi\n\nAlice:");  // Raven's sessions do not begin with the end of text.
  EXPECT_THAT(request().stop(), ElementsAre("\n\nBob:"));
  EXPECT_EQ(Call({"chat", "--template=instruction", "--system", "Translate.", "--stop=x"}, "Hi\nMore\n"), 0);
  EXPECT_EQ(Fed(router_.generate_requests[1]), Begun("Instruction: Translate.\n\nInput: Hi\n\nResponse:"));
  EXPECT_EQ(request().text(), "\n\nInstruction: More\n\nResponse:");
  EXPECT_THAT(request().stop(), ElementsAre("x"));
  router_.chat_template = "";
  router_.model_name = "rwkv7-g1a-0.1b-20250728-ctx4096";
  terminal_ = true;
  router_.answer = ">\nHm.</think>\nYes.";
  EXPECT_EQ(Call({"chat", "--think=on"}, "Hi\n"), 0);
  EXPECT_EQ(Fed(request()), Begun("User: Hi\n\nAssistant: <think"));
  EXPECT_EQ(out_, "Assistant: <think>\nHm.</think>\nYes.\n");
  terminal_ = false;
  router_.answer = ">\nYes.";
  EXPECT_EQ(Call({"chat", "--think=off"}, "Hi\n"), 0);
  EXPECT_EQ(Fed(request()), Begun("User: Hi\n\nAssistant: <think>\n</think"));
  EXPECT_EQ(out_, "Yes.\n");
}

TEST_F(RwkvctlTest, ChatRefusesWhatTheTemplateCannotDo) {
  EXPECT_EQ(Call({"chat", "--template=nobody's"}, "Hi\n"), 2);
  EXPECT_THAT(err_, AllOf(HasSubstr("nobody's"), HasSubstr("world, g1, instruction, raven")));
  EXPECT_EQ(Call({"chat", "--think=maybe"}, "Hi\n"), 2);
  EXPECT_EQ(Call({"chat", "--think=on"}, "Hi\n"), 1);
  EXPECT_THAT(err_, HasSubstr("\"world\" knows no thinking"));
  router_.logs["s"] = {'H', 'i'};
  EXPECT_EQ(Call({"chat", "--session=s", "--system=Be kind."}, "Hi\n"), 1);
  EXPECT_THAT(err_, HasSubstr("has begun without it"));
}

TEST_F(RwkvctlTest, GenerateWithATemplateIsOneTurnOfAChat) {
  router_.answer = " Hello.";
  EXPECT_EQ(Call({"generate", "--template", "world", "--prompt", "Hi\n\nthere "}), 0);
  EXPECT_EQ(out_, "Hello.");
  EXPECT_EQ(Fed(request()), Begun("User: Hi\nthere\n\nAssistant:"));
  EXPECT_THAT(request().stop(), ElementsAre("\n\nUser:"));
  router_.logs["s"] = {'x'};
  EXPECT_EQ(Call({"generate", "--template=world", "--session=s", "--prompt=Hi"}), 0);
  EXPECT_EQ(request().text(), "\n\nUser: Hi\n\nAssistant:");
  EXPECT_EQ(Call({"generate", "--template=world", "--tokens=1"}), 1);
  EXPECT_THAT(err_, HasSubstr("--template needs --prompt"));
  EXPECT_EQ(Call({"generate", "--template=world", "--prompt=Hi", "--session=s", "--resume-from=1"}), 2);
  EXPECT_EQ(Call({"generate", "--think=on", "--prompt=Hi"}), 2);
  EXPECT_THAT(err_, HasSubstr("need --template"));
}

TEST_F(RwkvctlTest, ChatContinuesAnAnswerAndGivesItAnew) {
  router_.answer = " Hello there.";
  EXPECT_EQ(Call({"chat", "--max-tokens=6", "--seed=7"}, "Hi\n/continue\n/regenerate\n"), 0);
  EXPECT_EQ(out_, "Hello\nthere\nHello\n");
  ASSERT_THAT(router_.generate_requests, SizeIs(3));
  for (int i = 1; i < 3; ++i) {
    EXPECT_EQ(router_.generate_requests[i].input_case(), v1::GenerateRequest::INPUT_NOT_SET);
    EXPECT_THAT(router_.generate_requests[i].stop(), ElementsAre("\n\nUser:"));
  }
  EXPECT_EQ(router_.generate_requests[1].sampling().seed(), 7);
  EXPECT_EQ(router_.generate_requests[2].sampling().seed(), 8) << "the same seed would give the same answer";
  const std::vector<uint32_t>& log = router_.logs["session-1"];
  EXPECT_EQ(std::string(log.begin(), log.end()), Begun("User: Hi\n\nAssistant: Hello"));

  EXPECT_EQ(Call({"chat"}, "/regenerate\n"), 1);
  EXPECT_THAT(err_, HasSubstr("no whole answer"));
  EXPECT_EQ(Call({"chat"}, "/continue\n"), 1);
}

TEST_F(RwkvctlTest, ChatInterruptEndsTheAnswerNotTheSession) {
  terminal_ = true;
  router_.answer = "a long answer";
  int answers = 0;
  router_.on_token = [&](uint64_t index) {
    if (index == 3 && ++answers == 1) interrupts_.Interrupt();
  };
  EXPECT_EQ(Call({"chat"}, "one\ntwo\n"), 0);
  EXPECT_THAT(out_, StartsWith("Assistant: a l\n"));
  EXPECT_THAT(out_, HasSubstr("a long answer"));
  EXPECT_THAT(err_, HasSubstr("[stopped]"));
  ASSERT_THAT(router_.generate_requests, SizeIs(2));
  EXPECT_EQ(router_.generate_requests[1].text(), "\n\nUser: two\n\nAssistant:");
}

TEST_F(RwkvctlTest, ChatTriesAgainWhileTheLastTurnStillHoldsTheSession) {
  const absl::Status busy = common::WithRetryInfo(absl::AbortedError("a turn is running"), absl::ZeroDuration());
  router_.first_statuses = {busy, busy};
  EXPECT_EQ(Call({"chat"}, "Hi\n"), 0);
  ASSERT_THAT(router_.generate_requests, SizeIs(3));
  EXPECT_EQ(router_.generate_requests[0].request_id(), router_.generate_requests[2].request_id());
  EXPECT_EQ(out_, "Hello.\n");
}

TEST_F(RwkvctlTest, ChatErrorsEndAScriptButNotATerminal) {
  router_.first_statuses = {absl::UnavailableError("no pipeline")};
  EXPECT_EQ(Call({"chat"}, "one\ntwo\n"), 1);
  EXPECT_THAT(err_, HasSubstr("UNAVAILABLE: no pipeline (router 127.0.0.1:4711)"));
  terminal_ = true;
  router_.first_statuses = {absl::UnavailableError("no pipeline")};
  EXPECT_EQ(Call({"chat"}, "one\ntwo\n"), 0);
  EXPECT_THAT(err_, HasSubstr("UNAVAILABLE: no pipeline"));
  EXPECT_THAT(out_, HasSubstr("Hello."));
}

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
