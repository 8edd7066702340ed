#include "services/common/http_server.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <list>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"

namespace rwkv::common {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using boost::asio::ip::tcp;
using boost::system::error_code;

constexpr std::chrono::milliseconds kAcceptPause(100);  // After an accept that failed, as for want of descriptors.

}  // namespace

// Everything but Stop() and Listen() runs on the server's thread.
class HttpServer::Connections {
 public:
  explicit Connections(Handler handler) : handler_(std::move(handler)), acceptor_(context_), pause_(context_) {}

  // The port taken, or why not.
  absl::StatusOr<uint16_t> Listen(const HostPort& address) {
    error_code error;
    tcp::resolver resolver(context_);
    const auto found = resolver.resolve(address.host, absl::StrCat(address.port),
                                        tcp::resolver::passive | tcp::resolver::numeric_service, error);
    if (!error && found.empty()) error = asio::error::host_not_found;
    if (!error) {
      const tcp::endpoint endpoint = found.begin()->endpoint();
      acceptor_.open(endpoint.protocol(), error);
      if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
      if (!error) acceptor_.bind(endpoint, error);
      if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    }
    const uint16_t port = error ? 0 : acceptor_.local_endpoint(error).port();
    if (error) return absl::UnavailableError(error.message());
    return port;
  }

  void Run() {
    Accept();
    context_.run();
  }

  void Stop() { context_.stop(); }

 private:
  // One request and its answer. Owned by its pending operation; `open_` has a weak hold on it.
  struct Connection {
    explicit Connection(tcp::socket socket) : stream(std::move(socket)), buffer(kMaxRequestBytes) {
      parser.header_limit(kMaxRequestBytes);
      parser.body_limit(0);
    }
    beast::tcp_stream stream;
    beast::flat_buffer buffer;
    http::request_parser<http::empty_body> parser;
    http::response<http::string_body> answer;
    std::list<std::weak_ptr<Connection>>::iterator place;
  };

  void Accept() {
    acceptor_.async_accept([this](error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted) return;
      if (error) {
        pause_.expires_after(kAcceptPause);
        pause_.async_wait([this](error_code) { Accept(); });
        return;
      }
      Begin(std::move(socket));
      Accept();
    });
  }

  void Begin(tcp::socket socket) {
    if (open_.size() >= kMaxConnections) {
      // The oldest: it has had the most time. Its pending operation ends with an error, and with it the connection.
      if (const std::shared_ptr<Connection> oldest = open_.front().lock()) {
        oldest->stream.close();
        oldest->place = open_.end();
      }
      open_.pop_front();
    }
    const auto deleter = [this](Connection* connection) {
      if (connection->place != open_.end()) open_.erase(connection->place);
      delete connection;
    };
    const std::shared_ptr<Connection> connection(new Connection(std::move(socket)), deleter);
    connection->place = open_.insert(open_.end(), connection);
    connection->stream.expires_after(absl::ToChronoNanoseconds(kRequestTime));
    http::async_read_header(connection->stream, connection->buffer, connection->parser,
                            [this, connection](error_code error, size_t) { Answer(connection, error); });
  }

  void Answer(const std::shared_ptr<Connection>& connection, error_code error) {
    http::response<http::string_body>& answer = connection->answer;
    if (!error) {
      const auto& request = connection->parser.get();
      answer.version(request.version());
      Fill(request.method(), request.target(), &answer);
    } else if (error == http::error::header_limit || error == http::error::buffer_overflow) {
      answer.result(http::status::request_header_fields_too_large);
    } else if (error.category() == make_error_code(http::error::bad_method).category() &&
               error != http::error::end_of_stream && error != http::error::partial_message) {
      answer.result(http::status::bad_request);
    } else {
      return;  // It hung up, or was too slow.
    }
    answer.keep_alive(false);
    answer.prepare_payload();
    connection->stream.expires_after(absl::ToChronoNanoseconds(kAnswerTime));
    http::async_write(connection->stream, answer, [connection](error_code, size_t) {
      error_code ignored;
      connection->stream.socket().shutdown(tcp::socket::shutdown_send, ignored);
    });
  }

  void Fill(http::verb method, beast::string_view target, http::response<http::string_body>* answer) {
    if (method != http::verb::get && method != http::verb::head) {
      answer->result(http::status::method_not_allowed);
      answer->set(http::field::allow, "GET, HEAD");
      return;
    }
    const absl::string_view path(target.data(), target.substr(0, target.find('?')).size());
    std::unique_ptr<Page> page = handler_(path);
    if (page == nullptr) {
      answer->result(http::status::not_found);
      return;
    }
    answer->set(http::field::content_type, page->content_type);
    if (method == http::verb::get) answer->body() = std::move(page->body);
  }

  const Handler handler_;
  std::list<std::weak_ptr<Connection>> open_;  // By age. Outlives the operations that the context holds.
  asio::io_context context_{1};
  tcp::acceptor acceptor_;
  asio::steady_timer pause_;
};

HttpServer::HttpServer(std::unique_ptr<Connections> connections) : connections_(std::move(connections)) {}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(absl::string_view listen_address, Handler handler) {
  RWKV_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(listen_address));
  std::unique_ptr<HttpServer> server(new HttpServer(std::make_unique<Connections>(std::move(handler))));
  const absl::StatusOr<uint16_t> port = server->connections_->Listen(address);
  if (!port.ok()) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", listen_address,
                                               " (in use, or no address of this machine): ", port.status().message()));
  }
  address.port = *port;
  server->address_ = FormatHostPort(address);
  server->thread_ = std::thread([connections = server->connections_.get()] { connections->Run(); });
  return server;
}

HttpServer::~HttpServer() {
  connections_->Stop();
  if (thread_.joinable()) thread_.join();
}

}  // namespace rwkv::common
