// The three services over gRPC's in-process transport, in front of a fake cluster.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "services/common/clock.h"
#include "services/common/executor.h"
#include "services/common/grpc_status.h"
#include "services/common/metrics.h"
#include "services/common/security/access.h"
#include "services/common/security/security.h"
#include "services/router/rpc/cluster_service.h"
#include "services/router/rpc/generation_service.h"
#include "services/router/rpc/sessions_service.h"
#include "services/router/rpc/uploads.h"
#include "services/router/tenants/tenancy.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {

class ServicesTest : public ::testing::Test {
 protected:
  void StartServer(worker::FakePipeline::Options pipeline = {}, TurnManager::Options options = {}) {
    options.allow_logits = true;
    options.limits.max_prompt_tokens = 100;
    options.limits.max_generated_tokens = 5000;
    vocabulary_ = pipeline.vocab_size;
    cluster_ = std::make_unique<FakeCluster>(pipeline, options);
    executor_ = std::make_unique<common::Executor>(4, 64);
    const auto random = [this] { return ++random_; };
    // Who calls is what the call says; see As().
    Tenancy::Options tenancy;
    if (with_tenants_) {
      tenancy.identify = [](const grpc::ServerContextBase& context) -> absl::StatusOr<common::Identity> {
        common::Identity identity;
        const auto tenant = context.client_metadata().find("test-tenant");
        if (tenant != context.client_metadata().end()) {
          identity.tenant.assign(tenant->second.data(), tenant->second.size());
        }
        identity.roles.Add(identity.tenant.empty() ? common::Role::kOperator : common::Role::kClient);
        return identity;
      };
    }
    tenancy.tenants_file = tenants_file_;
    tenancy.reload_interval = absl::ZeroDuration();
    tenancy.storage_age = absl::ZeroDuration();
    tenancy.source = "router-0-1";
    tenancy.max_calls = max_calls_;
    tenancy.max_store_calls = max_store_calls_;
    tenancy.random = random;
    metrics_ = *common::Metrics::Create("");
    absl::StatusOr<std::unique_ptr<Tenancy>> created =
        Tenancy::Create(tenancy, &cluster_->store(), &clock_, metrics_.get());
    ASSERT_THAT(created, ::rwkv::testing::IsOk());
    tenancy_ = *std::move(created);
    generation_service_ =
        std::make_unique<GenerationService>(&cluster_->router(), executor_.get(), upload_limits_, tenancy_.get());
    sessions_service_ = std::make_unique<SessionsService>(&cluster_->router(), &cluster_->store(), &cluster_->store(),
                                                          executor_.get(), random, upload_limits_, tenancy_.get());
    cluster_service_ = std::make_unique<ClusterService>(
        "router-0", std::vector<std::string>{"store:1", "store:2"},
        [this](absl::Time deadline) {
          return std::vector<absl::StatusOr<v1::StateCatalogDescribeResponse>>{
              cluster_->store().Describe({}, deadline), absl::UnavailableError("store:2 is away")};
        },
        &cluster_->router(), executor_.get(), tenancy_.get());
    cluster_service_->SetAddresses("router:1", "router:2");
    grpc::ServerBuilder builder;
    builder.RegisterService(generation_service_.get());
    builder.RegisterService(sessions_service_.get());
    builder.RegisterService(cluster_service_.get());
    server_ = builder.BuildAndStart();
    const std::shared_ptr<grpc::Channel> channel = server_->InProcessChannel(grpc::ChannelArguments());
    generation_ = v1::Generation::NewStub(channel);
    sessions_ = v1::Sessions::NewStub(channel);
    cluster_stub_ = v1::Cluster::NewStub(channel);
  }

  void TearDown() override {
    if (server_ != nullptr) server_->Shutdown(absl::ToChronoTime(absl::Now() + kTestLimit));
    executor_ = nullptr;
  }

  static void SetLimit(grpc::ClientContext& context) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + kTestLimit));
  }

  struct Result {
    absl::Status status;
    std::vector<uint32_t> tokens;
    std::string text;
    v1::Finish finish;
  };
  // From now on calls are of this tenant; empty: an operator's.
  void As(const std::string& tenant) { as_ = tenant; }
  void Begin(grpc::ClientContext& context, absl::Duration timeout = kTestLimit) const {
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    if (!as_.empty()) context.AddMetadata("test-tenant", as_);
  }
  Result Generate(const v1::GenerateRequest& request, absl::Duration timeout = kTestLimit) {
    grpc::ClientContext context;
    Begin(context, timeout);
    Result result;
    const auto reader = generation_->Generate(&context, request);
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
      result.text += message.text();
      if (message.has_finish()) {
        result.finish = message.finish();
      } else {
        result.tokens.push_back(message.token_id());
      }
    }
    result.status = common::FromGrpcStatus(reader->Finish());
    return result;
  }

  template <typename Stub, typename Request, typename Response>
  absl::Status Call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    Begin(context);
    return common::FromGrpcStatus((stub.*method)(&context, request, response));
  }

  std::string CreateSession(const std::string& id = "") {
    v1::SessionsCreateRequest request;
    request.set_session_id(id);
    v1::SessionsCreateResponse response;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, request, &response), ::rwkv::testing::IsOk());
    return response.session().id();
  }

  struct Tensor {
    std::vector<int64_t> shape;
    std::string bytes;
    uint64_t position = 0;
  };
  absl::Status Export(const std::string& id, std::map<std::string, Tensor>* tensors) {
    grpc::ClientContext context;
    Begin(context);
    v1::SessionsExportStateRequest request;
    request.set_session_id(id);
    const auto reader = sessions_->ExportState(&context, request);
    v1::SessionsExportStateResponse message;
    while (reader->Read(&message)) {
      Tensor& tensor = (*tensors)[message.tensor()];
      EXPECT_EQ(message.offset_bytes(), tensor.bytes.size());
      tensor.shape.assign(message.shape().begin(), message.shape().end());
      tensor.bytes += message.data();
      tensor.position = message.position();
    }
    return common::FromGrpcStatus(reader->Finish());
  }

  UploadLimits upload_limits_{kTestLimit, 2 * kTestLimit};  // Before StartServer().
  bool with_tenants_ = false;                               // Likewise.
  std::string tenants_file_;                                // Likewise.
  int max_calls_ = 0;                                       // Likewise.
  int max_store_calls_ = 0;                                 // Likewise.
  std::string as_;
  common::SystemClock clock_;
  std::unique_ptr<common::Metrics> metrics_;
  std::atomic<uint64_t> random_{0};
  int vocabulary_ = 0;
  std::unique_ptr<FakeCluster> cluster_;
  std::unique_ptr<Tenancy> tenancy_;
  std::unique_ptr<common::Executor> executor_;
  std::unique_ptr<GenerationService> generation_service_;
  std::unique_ptr<SessionsService> sessions_service_;
  std::unique_ptr<ClusterService> cluster_service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::Generation::Stub> generation_;
  std::unique_ptr<v1::Sessions::Stub> sessions_;
  std::unique_ptr<v1::Cluster::Stub> cluster_stub_;
};

// What most tests feed.
inline const std::vector<uint32_t> kPrompt = {5, 6, 7, 8};

// Ids of a World model, so that there is text.
inline worker::FakePipeline::Options World() {
  worker::FakePipeline::Options options;
  options.vocab_size = 65536;
  return options;
}

}  // namespace rwkv::router
