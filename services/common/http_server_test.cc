#include "services/common/http_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

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
#include "services/common/address.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr int kLargeBytes = 64 << 20;  // More than both ends' socket buffers hold.

// A connection to the server; reading gives up after ten seconds.
class Client {
 public:
  explicit Client(const std::string& address) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    const HostPort host_port = *ParseHostPort(address);
    sockaddr_in peer = {};
    peer.sin_family = AF_INET;
    peer.sin_port = htons(host_port.port);
    inet_pton(AF_INET, host_port.host.c_str(), &peer.sin_addr);
    const timeval limit = {10, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&peer), sizeof(peer)), 0);
  }
  ~Client() { close(fd_); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  void Send(absl::string_view text) { EXPECT_EQ(send(fd_, text.data(), text.size(), MSG_NOSIGNAL), text.size()); }
  // Everything until the server hangs up.
  std::string Read() {
    std::string answer;
    char buffer[4096];
    for (ssize_t n = 0; (n = recv(fd_, buffer, sizeof(buffer), 0)) > 0;) answer.append(buffer, static_cast<size_t>(n));
    return answer;
  }

 private:
  const int fd_;
};

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
    Client client(server_->address());
    client.Send(request);
    return client.Read();
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
  std::vector<std::unique_ptr<Client>> stalled;
  for (int i = 0; i < 60; ++i) {
    stalled.push_back(std::make_unique<Client>(server_->address()));
    if (i % 3 == 1) stalled.back()->Send("GET /page HTT");
    if (i % 15 == 2) stalled.back()->Send("GET /large HTTP/1.1\r\nHost: x\r\n\r\n");  // And never reads.
  }
  ExpectQuickAnswer();
}

TEST_F(HttpServerTest, TheNewestConnectionIsServedHoweverManyStall) {
  std::vector<std::unique_ptr<Client>> stalled;
  for (int i = 0; i < 3 * HttpServer::kMaxConnections; ++i) {
    stalled.push_back(std::make_unique<Client>(server_->address()));
  }
  ExpectQuickAnswer();
  EXPECT_EQ(stalled.front()->Read(), "") << "the oldest was closed";
}

TEST_F(HttpServerTest, SilenceIsNotAwaitedForEver) {
  Client silent(server_->address());
  const absl::Time begin = absl::Now();
  EXPECT_EQ(silent.Read(), "");
  EXPECT_LT(absl::Now() - begin, absl::Seconds(9)) << "closed by our own limit of reading";
}

TEST_F(HttpServerTest, EndsWithConnectionsOpen) {
  Client silent(server_->address());
  Client slow(server_->address());
  slow.Send("GET /large HTTP/1.1\r\nHost: x\r\n\r\n");
  ExpectQuickAnswer();
  const absl::Time begin = absl::Now();
  server_.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
  EXPECT_EQ(silent.Read(), "");
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
