// A compressed message is refused without being unpacked, by servers and by clients.
#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_context.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/common/rpc_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_connection.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

// 50 KB of gzip: a flow-control window (64 KB) holds it, so that it can be sent without listening.
constexpr int64_t kUnpackedBytes = 48 << 20;

class StatusService : public v1::Cluster::Service {
 public:
  grpc::Status GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest* /*request*/,
                         v1::GetStatusResponse* response) override {
    if (compress) context->set_compression_algorithm(GRPC_COMPRESS_GZIP);
    response->set_pipeline_state(std::string(compress ? 3 << 20 : 1, 'x'));
    return grpc::Status::OK;
  }
  bool compress = false;
};

// kUnpackedBytes zeros as gzip.
std::string Bomb() {
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 9, Z_DEFAULT_STRATEGY), Z_OK);
  std::vector<unsigned char> zeros(1 << 20), out(1 << 16);
  std::string packed;
  for (int64_t done = 0; done < kUnpackedBytes; done += static_cast<int64_t>(zeros.size())) {
    const bool last = done + static_cast<int64_t>(zeros.size()) >= kUnpackedBytes;
    stream.next_in = zeros.data();
    stream.avail_in = static_cast<unsigned>(zeros.size());
    do {
      stream.next_out = out.data();
      stream.avail_out = static_cast<unsigned>(out.size());
      deflate(&stream, last ? Z_FINISH : Z_NO_FLUSH);
      packed.append(reinterpret_cast<char*>(out.data()), out.size() - stream.avail_out);
    } while (stream.avail_out == 0);
  }
  deflateEnd(&stream);
  return packed;
}

// The largest resident size of this process since the last call, in bytes.
int64_t TakePeakBytes() {
  int64_t kilobytes = 0;
  if (std::FILE* const status = std::fopen("/proc/self/status", "r")) {
    char line[256];
    while (std::fgets(line, sizeof(line), status) != nullptr) std::sscanf(line, "VmHWM: %ld", &kilobytes);
    std::fclose(status);
  }
  if (std::FILE* const reset = std::fopen("/proc/self/clear_refs", "w")) {
    std::fputs("5", reset);
    std::fclose(reset);
  }
  return kilobytes * 1024;
}

// A gRPC call by hand, as no library would make it: HTTP/2 frames (RFC 9113), headers as literals (RFC 7541, 6.2.2).
class RawCall {
 public:
  explicit RawCall(const std::string& address) : connection_(address) {}

  void Send(absl::string_view path, absl::string_view encoding, const std::string& packed) {
    std::string headers;
    for (const auto& [name, value] :
         std::vector<std::pair<absl::string_view, absl::string_view>>{{":method", "POST"},
                                                                      {":scheme", "http"},
                                                                      {":path", path},
                                                                      {":authority", "x"},
                                                                      {"content-type", "application/grpc"},
                                                                      {"te", "trailers"},
                                                                      {"grpc-encoding", encoding}}) {
      headers += '\0';
      headers += static_cast<char>(name.size());
      headers.append(name.data(), name.size());
      headers += static_cast<char>(value.size());
      headers.append(value.data(), value.size());
    }
    std::string message(1, '\1');  // Compressed.
    for (int shift = 24; shift >= 0; shift -= 8) message += static_cast<char>(packed.size() >> shift & 0xff);
    message += packed;
    connection_.Send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    WriteFrame(4, 0, 0, "");
    WriteFrame(1, 4, 1, headers);
    constexpr size_t kFrame = 16384;
    for (size_t at = 0; at < message.size(); at += kFrame) {
      WriteFrame(0, at + kFrame >= message.size() ? 1 : 0, 1, message.substr(at, kFrame));
    }
  }

  // Until the server ends the call or hangs up; false if it does neither in ten seconds.
  bool WaitForEnd() {
    std::string seen;
    char buffer[4096];
    for (ssize_t n = 0; (n = connection_.Receive(buffer, sizeof(buffer))) != 0;) {
      if (n < 0) return errno == ECONNRESET;
      seen.append(buffer, static_cast<size_t>(n));
      while (seen.size() >= 9) {
        const auto byte = [&](int i) { return static_cast<size_t>(static_cast<unsigned char>(seen[i])); };
        const size_t length = byte(0) << 16 | byte(1) << 8 | byte(2);
        if (seen.size() < 9 + length) break;
        const bool ends = (byte(3) <= 1 && (byte(4) & 1) != 0) || byte(3) == 3 || byte(3) == 7;  // RST_STREAM, GOAWAY
        if (ends) return true;
        seen.erase(0, 9 + length);
      }
    }
    return true;
  }

 private:
  void WriteFrame(int type, int flags, uint32_t stream, const std::string& payload) {
    std::string frame;
    for (int shift = 16; shift >= 0; shift -= 8) frame += static_cast<char>(payload.size() >> shift & 0xff);
    frame += static_cast<char>(type);
    frame += static_cast<char>(flags);
    for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(stream >> shift & 0xff);
    connection_.Send(frame + payload);  // What the server has not wanted is not said.
  }

  testing::TcpConnection connection_;
};

TEST(CompressionTest, AServerUnpacksNothing) {
  StatusService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  const std::string bomb = Bomb();
  ASSERT_LT(bomb.size(), 60000u);
  for (const char* encoding : {"gzip", "deflate", "identity", "brotli"}) {
    TakePeakBytes();
    const int64_t before = TakePeakBytes();
    std::vector<std::unique_ptr<RawCall>> calls;
    for (int i = 0; i < 4; ++i) {
      calls.push_back(std::make_unique<RawCall>(server->address()));
      calls.back()->Send("/rwkv.v1.Cluster/GetStatus", encoding, bomb);
    }
    for (const auto& call : calls) EXPECT_TRUE(call->WaitForEnd()) << encoding;
    EXPECT_LT(TakePeakBytes() - before, 24 << 20) << encoding;
  }
}

TEST(CompressionTest, AClientThatCompressesIsToldSo) {
  StatusService service;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RpcServer> server, RpcServer::Start({}, {&service}));
  const auto stub = v1::Cluster::NewStub(grpc::CreateChannel(server->address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
  context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  v1::GetStatusRequest request;
  // An unknown length-delimited field (number 1,000) of 2,000 bytes: worth compressing.
  ASSERT_TRUE(request.ParseFromString("\xc2\x3e\xd0\x0f" + std::string(2000, 'x')));
  v1::GetStatusResponse response;
  EXPECT_THAT(FromGrpcStatus(stub->GetStatus(&context, request, &response)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("gzip")));
}

TEST(CompressionTest, AClientOfOursTakesNoCompressedAnswer) {
  StatusService service;
  service.compress = true;
  // Not RpcServer, which would not compress.
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  // As a server does that does not care what the client says it takes.
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  ASSERT_NE(server, nullptr);
  const auto stub = v1::Cluster::NewStub(MakeChannel("127.0.0.1:" + std::to_string(port)));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
  v1::GetStatusResponse response;
  const absl::Status status = FromGrpcStatus(stub->GetStatus(&context, {}, &response));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnimplemented));
}

}  // namespace
}  // namespace rwkv::common
