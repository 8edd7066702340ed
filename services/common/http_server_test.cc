#include "services/common/http_server.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_connection.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::rwkv::testing::TcpConnection;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr int kLargeBytes = 64 << 20;  // More than both ends' socket buffers hold.

class HttpServerTest : public ::testing::Test {
 protected:
  HttpServerTest() {
    server_ = *HttpServer::Start("127.0.0.1:0", [](absl::string_view path) {
      std::unique_ptr<HttpServer::Page> page;
      if (path != "/page" && path != "/large") return page;
      page = std::make_unique<HttpServer::Page>();
      page->content_type = "text/plain";
      page->body = path == "/page" ? "content" : std::string(kLargeBytes, 'x');
      return page;
    });
  }
  std::string Ask(absl::string_view request) {
    TcpConnection client(server_->address());
    client.Send(request);
    return client.ReadAll();
  }
  void ExpectQuickAnswer() {
    const absl::Time begin = absl::Now();
    EXPECT_THAT(Ask("GET /page HTTP/1.1\r\nHost: x\r\n\r\n"), HasSubstr("content"));
    EXPECT_LT(absl::Now() - begin, absl::Seconds(3)) << "kRequestTime is " << HttpServer::kRequestTime;
  }

  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, AnswersWithThePage) {
  const std::string answer = Ask("GET /page?name=value HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(answer, HasSubstr("Content-Type: text/plain\r\n"));
  EXPECT_THAT(answer, HasSubstr("Content-Length: 7\r\n"));
  EXPECT_TRUE(absl::EndsWith(answer, "\r\n\r\ncontent")) << answer;
  EXPECT_THAT(Ask("GET /page HTTP/1.0\r\n\r\n"), StartsWith("HTTP/1.0 200 OK\r\n"));
}

TEST_F(HttpServerTest, RefusesWhatItDoesNotServe) {
  EXPECT_THAT(Ask("GET /other HTTP/1.1\r\nHost: x\r\n\r\n"), StartsWith("HTTP/1.1 404 "));
  EXPECT_THAT(Ask("POST /page HTTP/1.1\r\nHost: x\r\n\r\n"), StartsWith("HTTP/1.1 405 "));
  EXPECT_THAT(Ask("HEAD /page HTTP/1.1\r\nHost: x\r\n\r\n"), Not(HasSubstr("content\r\n")));
  EXPECT_THAT(Ask("nonsense\r\n\r\n"), HasSubstr(" 400 "));
  EXPECT_THAT(Ask("GET /page HTTP/1.1\r\nLong: " + std::string(HttpServer::kMaxRequestBytes, 'x') + "\r\n\r\n"),
              HasSubstr(" 431 "));
  ExpectQuickAnswer();
}

TEST_F(HttpServerTest, StalledConnectionsHoldUpNobody) {
  std::vector<std::unique_ptr<TcpConnection>> stalled;
  for (int i = 0; i < 60; ++i) {
    stalled.push_back(std::make_unique<TcpConnection>(server_->address()));
    if (i % 3 == 1) stalled.back()->Send("GET /page HTT");
    if (i % 15 == 2) stalled.back()->Send("GET /large HTTP/1.1\r\nHost: x\r\n\r\n");  // And never reads.
  }
  ExpectQuickAnswer();
}

TEST_F(HttpServerTest, TheNewestConnectionIsServedHoweverManyStall) {
  std::vector<std::unique_ptr<TcpConnection>> stalled;
  for (int i = 0; i < 3 * HttpServer::kMaxConnections; ++i) {
    stalled.push_back(std::make_unique<TcpConnection>(server_->address()));
  }
  ExpectQuickAnswer();
  EXPECT_EQ(stalled.front()->ReadAll(), "") << "the oldest was closed";
}

TEST_F(HttpServerTest, SilenceIsNotAwaitedForEver) {
  TcpConnection silent(server_->address());
  const absl::Time begin = absl::Now();
  EXPECT_EQ(silent.ReadAll(), "");
  EXPECT_LT(absl::Now() - begin, absl::Seconds(9)) << "closed by our own limit of reading";
}

TEST_F(HttpServerTest, EndsWithConnectionsOpen) {
  TcpConnection silent(server_->address());
  TcpConnection slow(server_->address());
  slow.Send("GET /large HTTP/1.1\r\nHost: x\r\n\r\n");
  ExpectQuickAnswer();
  const absl::Time begin = absl::Now();
  server_.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
  EXPECT_EQ(silent.ReadAll(), "");
}

TEST(HttpServerStartTest, AddressesThatCannotBe) {
  const auto nothing = [](absl::string_view) { return std::unique_ptr<HttpServer::Page>(); };
  EXPECT_THAT(HttpServer::Start("127.0.0.1", nothing), StatusIs(absl::StatusCode::kInvalidArgument));
  // TEST-NET-1 (RFC 5737) is nobody's.
  EXPECT_THAT(HttpServer::Start("192.0.2.1:0", nothing),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("192.0.2.1:0")));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<HttpServer> first, HttpServer::Start("127.0.0.1:0", nothing));
  EXPECT_THAT(HttpServer::Start(first->address(), nothing),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(first->address())));
}

}  // namespace
}  // namespace rwkv::common
