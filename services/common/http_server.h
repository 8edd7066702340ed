// Answers HTTP GET, for /metrics: small pages, few readers, and any number of broken ones.
//
// One thread serves all connections without ever waiting for one of them, so whoever connects and falls silent, or
// reads its answer a byte at a time, holds up nobody. A connection is one request and its answer; it has kRequestTime
// to ask and kAnswerTime to take the answer, and of more than kMaxConnections the oldest is closed.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace rwkv::common {

class HttpServer {
 public:
  struct Page {
    std::string content_type;
    std::string body;
  };
  // The page at `path` (no query), or nothing: 404. Called on the server's thread; must not block.
  using Handler = std::function<std::unique_ptr<Page>(absl::string_view path)>;

  static constexpr absl::Duration kRequestTime = absl::Seconds(5);
  static constexpr absl::Duration kAnswerTime = absl::Seconds(10);
  static constexpr int kMaxConnections = 128;
  static constexpr int kMaxRequestBytes = 8 * 1024;

  // Listens on "HOST:PORT"; port 0 picks a free one, see address().
  // kInvalidArgument: not HOST:PORT. kUnavailable: cannot listen there (in use, not ours); the message names it.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(absl::string_view listen_address, Handler handler);

  // Closes all connections and joins the thread.
  ~HttpServer();

  // "HOST:PORT" with the port really taken.
  const std::string& address() const { return address_; }

 private:
  class Connections;

  explicit HttpServer(std::unique_ptr<Connections> connections);

  const std::unique_ptr<Connections> connections_;
  std::string address_;
  std::thread thread_;
};

}  // namespace rwkv::common
