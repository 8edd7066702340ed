// Conversations for a test that is no C++: with a cluster whose routers are behind one address, by TLS and API key.
//
//   conversations_main ADDRESS SERVER_NAME AUTHORITIES API_KEY_FILE CONVERSATIONS TOKENS_PER_TURN
//
// It does what lines on standard input say, and answers each with a line: "start" and "progress" (each conversation
// ends a turn) with "ok", "compare", the last one, with what there was. At the first thing that is wrong it ends with
// status 1, and what was wrong is among what it wrote.
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "services/common/channel.h"
#include "services/common/security/security.h"
#include "services/router/client/router_client.h"
#include "tests/testing/conversations.h"

namespace rwkv::testing {
namespace {

std::vector<std::string>& Arguments() {
  static auto* const arguments = new std::vector<std::string>;
  return *arguments;
}

void Say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

TEST(ConversationsMain, DoesWhatItIsTold) {
  const std::vector<std::string>& arguments = Arguments();
  Conversations::Options options;
  options.stories = 8;
  options.limit = absl::Minutes(3);
  ASSERT_TRUE(arguments.size() == 6 && absl::SimpleAtoi(arguments[4], &options.count) &&
              absl::SimpleAtoi(arguments[5], &options.tokens_per_turn))
      << "six arguments, of which the last two are numbers";
  common::ClientSecurityOptions security;
  security.server_name = arguments[1];
  security.authorities = arguments[2];
  security.api_key_file = arguments[3];
  const absl::StatusOr<common::ClientCredentials> credentials = common::MakeClientCredentials(security);
  ASSERT_TRUE(credentials.ok()) << credentials.status();
  common::ChannelOptions channel;
  channel.credentials = credentials->credentials;
  channel.server_name = credentials->server_name;
  const auto make_client = [&](int) {
    return router::MakeRouterClient(common::MakeChannel(arguments[0], channel), Patience());
  };

  Conversations conversations(make_client, options);
  for (std::string line; std::getline(std::cin, line);) {
    if (line == "start") {
      conversations.Start();
    } else if (line == "progress") {
      conversations.ExpectProgress();
    } else if (line == "compare") {
      conversations.Compare();
    } else {
      FAIL() << "'" << line << "' is not known";
    }
    if (HasFailure()) return;
    if (line != "compare") {
      Say("ok");
      continue;
    }
    char text[100];
    std::snprintf(text, sizeof(text), "%d turns of %d tokens, the longest pause %.1f s", conversations.turns(),
                  options.tokens_per_turn, absl::ToDoubleSeconds(conversations.longest_pause()));
    Say(text);
    return;
  }
}

}  // namespace
}  // namespace rwkv::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  rwkv::testing::Arguments().assign(argv + 1, argv + argc);
  return RUN_ALL_TESTS();
}
