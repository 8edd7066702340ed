#include "services/common/security/security_fixture.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/server_context.h"
#include "prometheus/metric_family.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::ReplaceFile;
using ::rwkv::testing::TestAuthority;
using ::rwkv::testing::TlsFolder;

grpc::Status StatusService::GetStatus(grpc::ServerContext* /*context*/, const v1::GetStatusRequest* /*request*/,
                                      v1::GetStatusResponse* response) {
  response->set_pipeline_state("serving");
  return grpc::Status::OK;
}

absl::Status Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method, absl::Duration patience,
                  const std::string& authorization) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + patience));
  if (!authorization.empty()) context.AddMetadata("authorization", authorization);
  grpc::CompletionQueue queue;
  grpc::GenericStub stub(channel);
  grpc::ByteBuffer response;
  grpc::Slice nothing;
  grpc::ByteBuffer request(&nothing, 1);
  grpc::Status status;
  const auto call = stub.PrepareUnaryCall(&context, method, request, &queue);
  call->StartCall();
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  return FromGrpcStatus(status);
}

SecurityTest::SecurityTest() {
  EXPECT_THAT(Metrics::Create(""), IsOk());
  metrics_ = *Metrics::Create("");
}

Security::Options SecurityTest::Files(const std::string& name, const TestAuthority::Pair& pair,
                                      const std::string& authorities) {
  TlsFolder folder(::testing::TempDir() + "/" + name);
  folder.Write(pair);
  folder.WriteAuthorities(authorities);
  Security::Options options;
  options.certificate = folder.certificate();
  options.key = folder.key();
  options.authorities = folder.authorities();
  return options;
}

std::unique_ptr<Security> SecurityTest::Make(const Security::Options& options) {
  absl::StatusOr<std::unique_ptr<Security>> security = Security::Create(options, metrics_.get());
  EXPECT_THAT(security, IsOk());
  return security.ok() ? *std::move(security) : nullptr;
}

void SecurityTest::Serve(const std::string& role, const std::string& api_keys) {
  Security::Options options = Files("server", authority_.IssueRole(role), authority_.certificate());
  options.role = *ParseRole(role);
  if (!api_keys.empty()) {
    options.api_keys = ::testing::TempDir() + "/api_keys";
    ReplaceFile(options.api_keys, api_keys);
  }
  ServeWith(options);
}

void SecurityTest::ServeWith(const Security::Options& options) {
  server_security_ = Make(options);
  RpcServer::Options server_options;
  server_options.credentials = server_security_->ForServer();
  server_options.health_address = "127.0.0.1:0";
  absl::StatusOr<std::unique_ptr<RpcServer>> server = RpcServer::Start(server_options, {&service_});
  ASSERT_THAT(server, IsOk());
  server_ = *std::move(server);
  server_->SetServing(true);
}

std::shared_ptr<grpc::Channel> SecurityTest::Dial(const Security& security, Role expected) {
  ChannelOptions options;
  options.credentials = security.ForChannelTo(expected);
  return MakeChannel(server_->address(), options);
}

std::shared_ptr<grpc::Channel> SecurityTest::DialAs(const std::string& role) {
  return Dial(*Make(Files("client", authority_.IssueRole(role), authority_.certificate())));
}

std::shared_ptr<grpc::Channel> SecurityTest::DialWith(const TestAuthority::Pair& pair) {
  return DialWith(pair, server_->address(), authority_.certificate());
}

std::shared_ptr<grpc::Channel> SecurityTest::DialWith(const TestAuthority::Pair& pair, const std::string& address,
                                                      const std::string& believed) {
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = believed;
  ssl.pem_private_key = pair.key;
  ssl.pem_cert_chain = pair.certificate;
  ChannelOptions options;
  options.credentials = grpc::SslCredentials(ssl);
  options.server_name = "localhost";
  return MakeChannel(address, options);
}

std::string SecurityTest::Scrape() const {
  std::string text;
  for (const prometheus::MetricFamily& family : metrics_->Collect()) {
    for (const prometheus::ClientMetric& metric : family.metric) {
      absl::StrAppend(&text, family.name);
      for (const auto& label : metric.label) absl::StrAppend(&text, " ", label.name, "=", label.value);
      absl::StrAppend(&text, " ", metric.gauge.value + metric.counter.value, "\n");
    }
  }
  return text;
}

}  // namespace rwkv::common
