// A cluster whose processes send their spans to a collector, and what came there.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.grpc.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.grpc.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/span_collector.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {

inline constexpr char kCall[] = "rwkv.v1.Generation/Generate";
inline constexpr char kClientSpan[] = "00f067aa0ba902b7";
inline constexpr uint32_t kPrompt[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

inline std::string TraceId(int number) {
  return absl::StrCat("4bf92f3577b34da6a3ce929d0e0e", absl::Hex(number, absl::kZeroPad4));
}

inline std::string Traced(int trace) { return absl::StrCat("00-", TraceId(trace), "-", kClientSpan, "-01"); }

using Received = std::vector<testing::SpanCollector::Received>;

class TracesTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = absl::StrCat(::testing::TempDir(), "/model.safetensors");
    ASSERT_OK(testing::WriteRandomModel({}, model_));
  }

  void Start(int stages, const std::string& endpoint, const std::vector<std::string>& router_flags = {}) {
    testing::LocalCluster::Options options;
    options.model = model_;
    options.stages = stages;
    options.worker_flags = {"--slots=1"};
    options.router_flags = router_flags;
    if (!endpoint.empty()) {
      const std::string flag = absl::StrCat("--otlp_traces_endpoint=", endpoint);
      for (auto* flags : {&options.worker_flags, &options.router_flags, &options.state_store_flags}) {
        flags->push_back(flag);
      }
    }
    absl::StatusOr<std::unique_ptr<testing::LocalCluster>> cluster = testing::LocalCluster::Start(options);
    ASSERT_OK(cluster.status());
    cluster_ = *std::move(cluster);
    generation_ = v1::Generation::NewStub(cluster_->Channel("router-0"));
    sessions_ = v1::Sessions::NewStub(cluster_->Channel("router-0"));
  }

  absl::Status CreateSession(const std::string& id) {
    grpc::ClientContext context;
    v1::SessionsCreateRequest request;
    v1::SessionsCreateResponse response;
    request.set_session_id(id);
    return common::FromGrpcStatus(sessions_->Create(&context, request, &response));
  }

  // A turn, in the trace `trace_parent`; empty: in none.
  absl::StatusOr<std::vector<uint32_t>> Generate(const std::string& session, const std::string& trace_parent,
                                                 uint32_t max_tokens = 24) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    if (!trace_parent.empty()) context.AddMetadata("traceparent", trace_parent);
    v1::GenerateRequest request;
    request.set_session_id(session);
    request.set_max_tokens(max_tokens);
    request.mutable_sampling()->set_temperature(0.5);
    request.mutable_sampling()->set_seed(7);
    request.mutable_tokens()->mutable_ids()->Assign(std::begin(kPrompt), std::end(kPrompt));
    std::vector<uint32_t> tokens;
    v1::GenerateResponse response;
    const auto reader = generation_->Generate(&context, request);
    while (reader->Read(&response)) {
      if (response.has_token_id()) tokens.push_back(response.token_id());
    }
    const grpc::Status status = reader->Finish();
    if (!status.ok()) return common::FromGrpcStatus(status);
    return tokens;
  }

  // What a call that is made with it is part of.
  static std::unique_ptr<grpc::ClientContext> InTrace(int trace) {
    auto context = std::make_unique<grpc::ClientContext>();
    context->set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    context->AddMetadata("traceparent", Traced(trace));
    return context;
  }
  template <typename Response, typename Stream>
  static absl::Status ReadAll(Stream& stream, std::vector<Response>* all = nullptr) {
    for (Response response; stream.Read(&response);) {
      if (all != nullptr) all->push_back(response);
    }
    return common::FromGrpcStatus(stream.Finish());
  }

  void ExpectTree(int trace, const std::vector<std::string>& expected) const {
    const std::set<std::string> tree = Tree(OfTrace(collector_.spans(), trace));
    EXPECT_THAT(tree, ::testing::IsSupersetOf(expected)) << "trace " << trace << ":\n" << absl::StrJoin(tree, "\n");
    EXPECT_THAT(tree, ::testing::Each(::testing::Not(::testing::HasSubstr("nobody"))));
  }

  static Received OfTrace(const Received& spans, int trace) {
    Received of;
    for (const testing::SpanCollector::Received& one : spans) {
      if (absl::BytesToHexString(one.span.trace_id()) == TraceId(trace)) of.push_back(one);
    }
    return of;
  }
  // "PROCESS NAME < PROCESS NAME of its parent".
  static std::set<std::string> Tree(const Received& spans) {
    std::map<std::string, std::string> names = {{absl::HexStringToBytes(kClientSpan), "client"}};
    for (const auto& one : spans) names[one.span.span_id()] = absl::StrCat(one.process, " ", one.span.name());
    std::set<std::string> tree;
    for (const auto& one : spans) {
      const auto parent = names.find(one.span.parent_span_id());
      tree.insert(absl::StrCat(names[one.span.span_id()], " < ", parent == names.end() ? "nobody" : parent->second));
    }
    return tree;
  }

  inline static std::string model_;
  testing::SpanCollector collector_;
  std::unique_ptr<testing::LocalCluster> cluster_;
  std::unique_ptr<v1::Generation::Stub> generation_;
  std::unique_ptr<v1::Sessions::Stub> sessions_;
};

}  // namespace rwkv
