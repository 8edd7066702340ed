// A connection for tests that say what no library would, byte by byte.
#pragma once

#include <sys/types.h>

#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::testing {

// Not thread-safe. Reading gives up after ten seconds.
class TcpConnection {
 public:
  // To "ADDRESS:PORT", ADDRESS in numbers. If nobody listens, Send() writes nothing and Read() reads nothing.
  explicit TcpConnection(const std::string& address);
  ~TcpConnection();
  TcpConnection(const TcpConnection&) = delete;
  TcpConnection& operator=(const TcpConnection&) = delete;

  // False: the other end has had enough.
  bool Send(absl::string_view bytes);
  // As recv(): how many bytes came, 0 at the end, -1 with errno.
  ssize_t Receive(char* buffer, size_t size);
  // Everything until the other end hangs up.
  std::string ReadAll();

 private:
  const int fd_;
};

// The answer to "GET `path`", headers and all; empty if nobody listens.
std::string HttpGet(const std::string& address, absl::string_view path);

}  // namespace rwkv::testing
