#include "tests/testing/tcp_connection.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "services/common/address.h"

namespace rwkv::testing {

TcpConnection::TcpConnection(const std::string& address) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  const common::HostPort host_port = *common::ParseHostPort(address);
  sockaddr_in peer = {};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(host_port.port);
  EXPECT_EQ(inet_pton(AF_INET, host_port.host.c_str(), &peer.sin_addr), 1) << address;
  const timeval limit = {10, 0};
  setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  (void)connect(fd_, reinterpret_cast<const sockaddr*>(&peer), sizeof(peer));
}

TcpConnection::~TcpConnection() { close(fd_); }

bool TcpConnection::Send(absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

ssize_t TcpConnection::Receive(char* buffer, size_t size) { return recv(fd_, buffer, size, 0); }

std::string TcpConnection::ReadAll() {
  std::string all;
  char buffer[4096];
  for (ssize_t n = 0; (n = Receive(buffer, sizeof(buffer))) > 0;) all.append(buffer, static_cast<size_t>(n));
  return all;
}

std::string HttpGet(const std::string& address, absl::string_view path) {
  TcpConnection connection(address);
  return connection.Send(absl::StrCat("GET ", path, " HTTP/1.0\r\n\r\n")) ? connection.ReadAll() : "";
}

}  // namespace rwkv::testing
