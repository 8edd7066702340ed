// Traces of real processes: one over router, workers and store, with the right parents, and none lost at the end; a
// collector that does not take them costs nothing.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/traces_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::testing::AnyOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

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
      expected.push_back(absl::StrCat("state_store-0 rwkv.v1.StateRecords/PutRecords < ", worker, " worker.save"));
      if (trace == 3) {
        expected.push_back(absl::StrCat("state_store-0 rwkv.v1.StateRecords/GetRecords < ", worker, " worker.attach"));
      }
    }
    expected.push_back("state_store-0 rwkv.v1.StateCatalog/BeginTurn < router-0 open");
    expected.push_back("state_store-0 rwkv.v1.StateCatalog/FindSnapshot < router-0 locate");
    ExpectTree(trace, expected);
    const std::set<std::string> tree = Tree(spans);
    for (const char* worker : {"worker-0 ", "worker-1 "}) {  // They are asked for tokens, or go on by themselves.
      EXPECT_THAT(tree, Contains(AnyOf(absl::StrCat(worker, "worker.decode < ", call),
                                       absl::StrCat(worker, "worker.lease < ", call))));
    }
    // Of the stage that the turn is in by then, or of the call.
    EXPECT_THAT(tree, Contains(HasSubstr("state_store-0 rwkv.v1.StateCatalog/CommitSnapshot < router-0")));
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
