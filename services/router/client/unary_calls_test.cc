// Calls that answer with one message.
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/router_client.h"
#include "services/router/client/router_client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using UnaryCallsTest = RouterClientTest;

TEST_F(UnaryCallsTest, AServerThatIsGoneIsUnavailable) {
  server_->Shutdown();
  EXPECT_THAT(Client()->GetStatus(), StatusIs(absl::StatusCode::kUnavailable));
}

TEST_F(UnaryCallsTest, CallsCarryTheirFieldsAndStatuses) {
  const std::unique_ptr<RouterClient> client = Client();
  v1::TokenizeRequest tokenize;
  tokenize.set_data(std::string("a\xFF", 2));
  ASSERT_OK_AND_ASSIGN(const v1::TokenizeResponse tokens, client->Tokenize(tokenize));
  EXPECT_THAT(tokens.token_ids(), ElementsAre('a', 0xFF));

  v1::SessionsCreateRequest create;
  create.set_session_id("new");
  ASSERT_OK_AND_ASSIGN(const v1::Session created, client->CreateSession(create));
  EXPECT_EQ(created.id(), "new");

  v1::SessionsGetRequest get;
  get.set_session_id("gone");
  EXPECT_THAT(client->GetSession(get), StatusIs(absl::StatusCode::kNotFound, HasSubstr("gone")));

  v1::SessionsForkRequest fork;
  fork.set_session_id("old");
  fork.set_position(3);
  fork.set_new_session_id("young");
  ASSERT_OK_AND_ASSIGN(const v1::Session forked, client->ForkSession(fork));
  EXPECT_EQ(forked.id(), "young");
  EXPECT_EQ(forked.fork_position(), 3);

  v1::SessionsRewindRequest rewind;
  rewind.set_position(5);
  ASSERT_OK_AND_ASSIGN(const v1::Session rewound, client->RewindSession(rewind));
  EXPECT_EQ(rewound.token_count(), 5);

  const absl::Status deleted = client->DeleteSession({});
  EXPECT_THAT(deleted, StatusIs(absl::StatusCode::kAborted));
  EXPECT_EQ(common::GetRetryDelay(deleted), absl::Milliseconds(70));

  ASSERT_OK_AND_ASSIGN(const v1::GetStatusResponse status, client->GetStatus());
  EXPECT_EQ(status.pipeline_state(), "serving");
  EXPECT_THAT(client->ListSessions({}), StatusIs(absl::StatusCode::kUnimplemented));
}

}  // namespace
}  // namespace rwkv::router
