// Traces of real processes: one over router, workers and store, with the right parents, and none lost at the end; a
// collector that does not take them costs nothing.
#include <algorithm>
#include <cstdint>
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
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::SpanCollector;
using ::testing::AnyOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::IsSupersetOf;
using ::testing::Not;
using ::testing::SizeIs;
using Received = std::vector<SpanCollector::Received>;

constexpr char kCall[] = "rwkv.v1.Generation/Generate";
constexpr char kClientSpan[] = "00f067aa0ba902b7";

std::string TraceId(int number) {
  return absl::StrCat("4bf92f3577b34da6a3ce929d0e0e", absl::Hex(number, absl::kZeroPad4));
}

class TracesTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = absl::StrCat(::testing::TempDir(), "/model.safetensors");
    ASSERT_OK(testing::WriteRandomModel({}, model_));
  }

  void Start(int stages, const std::string& endpoint, const std::vector<std::string>& router_flags = {}) {
    LocalCluster::Options options;
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
    absl::StatusOr<std::unique_ptr<LocalCluster>> cluster = LocalCluster::Start(options);
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
    for (uint32_t id = 1; id <= 12; ++id) request.mutable_tokens()->add_ids(id);
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

  static Received OfTrace(const Received& spans, int trace) {
    Received of;
    for (const SpanCollector::Received& one : spans) {
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

  static std::string model_;
  SpanCollector collector_;
  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<v1::Generation::Stub> generation_;
  std::unique_ptr<v1::Sessions::Stub> sessions_;
};
std::string TracesTest::model_;

std::string Traced(int trace) { return absl::StrCat("00-", TraceId(trace), "-", kClientSpan, "-01"); }

TEST_F(TracesTest, OneTraceOverAllProcessesAndNothingIsLostAtTheEnd) {
  Start(2, collector_.address());
  ASSERT_OK(CreateSession("a"));
  ASSERT_OK(CreateSession("b"));
  ASSERT_OK(Generate("a", Traced(1)).status());
  ASSERT_OK(Generate("b", Traced(2)).status());  // Takes the only slot.
  ASSERT_OK(Generate("a", Traced(3)).status());  // From the snapshot.
  ASSERT_OK(cluster_->Stop());

  const std::string call = absl::StrCat("router-0 ", kCall);
  for (int trace = 1; trace <= 3; ++trace) {
    const Received spans = OfTrace(collector_.spans(), trace);
    std::vector<std::string> expected = {absl::StrCat(call, " < client")};
    for (const char* stage : {"open", "locate", "attach", "prefill", "decode", "commit"}) {
      expected.push_back(absl::StrCat("router-0 ", stage, " < ", call));
    }
    for (const char* worker : {"worker-0", "worker-1"}) {
      for (const char* span : {"attach", "prefill", "save"}) {
        expected.push_back(absl::StrCat(worker, " worker.", span, " < ", call));
      }
      expected.push_back(absl::StrCat("state_store-0 rwkv.v1.StateRecords/PutRecord < ", worker, " worker.save"));
      if (trace == 3) {
        expected.push_back(absl::StrCat("state_store-0 rwkv.v1.StateRecords/GetRecord < ", worker, " worker.attach"));
      }
    }
    expected.push_back("state_store-0 rwkv.v1.StateCatalog/BeginTurn < router-0 open");
    expected.push_back("state_store-0 rwkv.v1.StateCatalog/FindSnapshot < router-0 locate");
    const std::set<std::string> tree = Tree(spans);
    EXPECT_THAT(tree, IsSupersetOf(expected)) << "trace " << trace << ":\n" << absl::StrJoin(tree, "\n");
    for (const char* worker : {"worker-0 ", "worker-1 "}) {  // They are asked for tokens, or go on by themselves.
      EXPECT_THAT(tree, Contains(AnyOf(absl::StrCat(worker, "worker.decode < ", call),
                                       absl::StrCat(worker, "worker.lease < ", call))));
    }
    // Of the stage that the turn is in by then, or of the call.
    EXPECT_THAT(tree, Contains(HasSubstr("state_store-0 rwkv.v1.StateCatalog/CommitSnapshot < router-0")));
    EXPECT_THAT(tree, Each(Not(HasSubstr("nobody"))));
    EXPECT_LT(spans.size(), 60) << "spans for each of 24 tokens?";
  }
  // All of them have come: as many turns as were run, each with its end.
  int ended = 0;
  for (const auto& one : collector_.spans()) {
    if (one.span.name() != kCall) continue;
    ++ended;
    EXPECT_EQ(one.service, "rwkv-router");
    EXPECT_EQ(one.Attribute("gen_ai.usage.input_tokens"), "12");
    EXPECT_EQ(one.Attribute("gen_ai.usage.output_tokens"), "24");
    EXPECT_EQ(one.Attribute("gen_ai.request.max_tokens"), "24");
    EXPECT_EQ(one.Attribute("gen_ai.request.temperature"), "0.5");
    EXPECT_EQ(one.Attribute("rpc.grpc.status_code"), "0");
    EXPECT_NE(one.Attribute("gen_ai.latency.time_to_first_token"), "");
  }
  EXPECT_EQ(ended, 3);
}

TEST_F(TracesTest, AWorkerThatGoesOnByItselfHasOneSpanForIt) {
  Start(1, collector_.address());
  ASSERT_OK(CreateSession("a"));
  ASSERT_OK(Generate("a", Traced(1)).status());
  ASSERT_OK(cluster_->Stop());
  int leases = 0;
  for (const auto& one : OfTrace(collector_.spans(), 1)) {
    if (one.span.name() != "worker.lease") continue;
    ++leases;
    EXPECT_EQ(one.Attribute("rwkv.tokens"), "23");  // The last one is drawn, not fed.
  }
  EXPECT_EQ(leases, 1);
}

TEST_F(TracesTest, WhoBeginsTheTraceDecides) {
  Start(1, collector_.address(), {"--trace_sample=0"});
  ASSERT_OK(Generate("", "").status());
  ASSERT_OK(Generate("", absl::StrCat("00-", TraceId(1), "-", kClientSpan, "-00")).status());
  ASSERT_OK(Generate("", "00-nonsense").status());
  ASSERT_OK(cluster_->Stop());
  EXPECT_THAT(collector_.spans(), IsEmpty());
}

TEST_F(TracesTest, ARouterBeginsTracesForThoseWhoBringNone) {
  Start(1, collector_.address());
  ASSERT_OK(Generate("", "").status());
  ASSERT_OK(cluster_->Stop());
  const Received spans = collector_.spans();
  const auto root = std::find_if(spans.begin(), spans.end(), [](const auto& one) { return one.span.name() == kCall; });
  ASSERT_NE(root, spans.end());
  EXPECT_EQ(root->span.parent_span_id(), "");
  std::set<std::string> traces;
  for (const auto& one : spans) traces.insert(one.span.trace_id());
  EXPECT_THAT(traces, SizeIs(1));
}

TEST_F(TracesTest, ACollectorThatIsDeadOrHangsChangesNoTokenAndHoldsUpNoEnd) {
  Start(1, "");
  const absl::StatusOr<std::vector<uint32_t>> expected = Generate("", Traced(1));
  ASSERT_OK(expected.status());
  ASSERT_OK(cluster_->Stop());
  collector_.Hang(true);
  for (const std::string& endpoint : {collector_.address(), std::string("127.0.0.1:1")}) {
    Start(1, endpoint);
    for (int i = 0; i < 3; ++i) {
      const absl::StatusOr<std::vector<uint32_t>> tokens = Generate("", Traced(1));
      ASSERT_OK(tokens.status());
      EXPECT_EQ(*tokens, *expected) << endpoint;
    }
    EXPECT_OK(cluster_->Stop());  // Within the time that every process has.
  }
}

}  // namespace
}  // namespace rwkv
