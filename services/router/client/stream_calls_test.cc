// Calls that stream: what goes out in pieces, what comes in order.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/router_client.h"
#include "services/router/client/router_client_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using StreamCallsTest = RouterClientTest;

TEST_F(StreamCallsTest, ADocumentGoesOutInPieces) {
  const std::unique_ptr<RouterClient> client = Client();
  v1::ScoreDocumentRequest document;
  document.set_model("m");
  for (uint32_t id = 0; id < 300000; ++id) document.add_token_ids(id);
  document.set_text(std::string((5 << 20) + 7, 'x'));  // More than a message may hold.
  std::vector<uint32_t> tokens;
  EXPECT_OK(client->ScoreDocument(document, [&](const v1::ScoreDocumentResponse& response) {
    tokens.insert(tokens.end(), response.token_ids().begin(), response.token_ids().end());
    return absl::OkStatus();
  }));
  ASSERT_EQ(tokens.size(), 300000 + document.text().size() - 1);
  for (uint32_t id = 1; id < 300000; ++id) ASSERT_EQ(tokens[id - 1], id);

  const auto ignore = [](const v1::ScoreDocumentResponse&) { return absl::OkStatus(); };
  document.Clear();
  document.set_model("m");
  document.set_text("!");
  document.add_token_ids(0);
  EXPECT_THAT(client->ScoreDocument(document, ignore), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("from 1 on")));
  document.add_token_ids(0);
  EXPECT_THAT(client->ScoreDocument(document, ignore), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("from 2 to 3")));
  EXPECT_THAT(client->ScoreDocument(document, [](const auto&) { return absl::UnavailableError("full"); }),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("full")));
  document.set_model("other");
  EXPECT_THAT(client->ScoreDocument(document, ignore), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(StreamCallsTest, ATextIsTokenizedInPieces) {
  const std::unique_ptr<RouterClient> client = Client();
  std::string text((5 << 20) + 7, 'x');
  text.back() = 'y';
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, client->TokenizeDocument(text));
  EXPECT_EQ(std::string(tokens.begin(), tokens.end()), text);
  EXPECT_THAT(client->TokenizeDocument("!"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer")));
}

TEST_F(StreamCallsTest, StreamsCallBackInOrderAndStopOnAnError) {
  const std::unique_ptr<RouterClient> client = Client();
  std::vector<std::string> tensors;
  EXPECT_OK(client->ExportState({}, [&](const v1::SessionsExportStateResponse& response) {
    tensors.push_back(response.tensor());
    return absl::OkStatus();
  }));
  EXPECT_THAT(tensors, ElementsAre("a", "b"));

  v1::LogitsRequest request;
  for (uint32_t id = 0; id < 1000; ++id) request.mutable_tokens()->add_ids(id);
  uint64_t rows = 0;
  EXPECT_THAT(client->Logits(request,
                             [&](const v1::LogitsResponse& response) {
                               EXPECT_EQ(response.first_row(), rows++);
                               return rows == 10 ? absl::DataLossError("disk full") : absl::OkStatus();
                             }),
              StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_EQ(rows, 10);
}

TEST_F(StreamCallsTest, AFileIsImportedInPiecesWithItsChecksum) {
  const std::unique_ptr<RouterClient> client = Client();
  std::string file((5 << 19) + 7, 'x');  // Two pieces and a half.
  file.back() = 'y';
  std::vector<uint64_t> sent;
  const auto progress = [&](uint64_t bytes) { sent.push_back(bytes); };
  ASSERT_OK_AND_ASSIGN(const v1::Session session, client->ImportSession("s", file, progress));
  EXPECT_EQ(session.id(), "s");
  EXPECT_EQ(session.token_count(), file.size());
  EXPECT_THAT(sent, ElementsAre(1 << 20, 2 << 20, file.size()));
  file[0] = 'n';
  file[1] = 'o';
  EXPECT_THAT(client->ImportSession("s", file, progress),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no state file")));
}

}  // namespace
}  // namespace rwkv::router
