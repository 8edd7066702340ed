// A server with certificates of a test's authority, and clients of any role that call it.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "services/common/metrics.h"
#include "services/common/rpc_server.h"
#include "services/common/security/access.h"
#include "services/common/security/security.h"
#include "tests/testing/certificates.h"

namespace rwkv::common {

constexpr char kGetStatus[] = "/rwkv.v1.Cluster/GetStatus";
constexpr absl::Duration kPatience = absl::Seconds(20);
// A server that must refuse: the channel keeps trying until this is over.
constexpr absl::Duration kRefusal = absl::Seconds(3);

class StatusService : public v1::Cluster::Service {
  grpc::Status GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest* request,
                         v1::GetStatusResponse* response) override;
};

// One call of any method, without a message worth the name.
absl::Status Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                  absl::Duration patience = kPatience, const std::string& authorization = "");

class SecurityTest : public ::testing::Test {
 protected:
  SecurityTest();

  // Files of a process, in a folder of their own.
  static Security::Options Files(const std::string& name, const testing::TestAuthority::Pair& pair,
                                 const std::string& authorities);
  std::unique_ptr<Security> Make(const Security::Options& options);

  // Serves with a certificate of the role.
  void Serve(const std::string& role, const std::string& api_keys = "");
  void ServeWith(const Security::Options& options);

  std::shared_ptr<grpc::Channel> Dial(const Security& security, Role expected = Role::kRouter);
  std::shared_ptr<grpc::Channel> DialAs(const std::string& role);
  // A client that shows what gRPC alone would let it show, right or not: no check of ours is in its way.
  std::shared_ptr<grpc::Channel> DialWith(const testing::TestAuthority::Pair& pair);
  static std::shared_ptr<grpc::Channel> DialWith(const testing::TestAuthority::Pair& pair, const std::string& address,
                                                 const std::string& believed);

  // The metrics, a line each.
  std::string Scrape() const;

  testing::TestAuthority authority_{"ours"};
  std::unique_ptr<Metrics> metrics_;
  StatusService service_;
  std::unique_ptr<Security> server_security_;
  std::unique_ptr<RpcServer> server_;
};

}  // namespace rwkv::common
