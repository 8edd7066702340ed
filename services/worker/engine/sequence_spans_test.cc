#include "services/worker/engine/sequence_spans.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"
#include "services/common/tracing/tracer.h"
#include "tests/testing/span_collector.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::SpanCollector;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr char kParent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

v1::AttachSequence Attach(int slot, uint64_t sequence, const std::string& trace_parent) {
  v1::AttachSequence attach;
  attach.set_slot(slot);
  attach.set_sequence(sequence);
  attach.set_fresh(true);
  attach.set_trace_parent(trace_parent);
  return attach;
}

v1::Step Step(int slot, uint64_t sequence, int tokens, bool sample) {
  v1::Step step;
  v1::StepEntry& entry = *step.add_entries();
  entry.set_slot(slot);
  entry.set_sequence(sequence);
  for (int i = 0; i < tokens; ++i) entry.add_token_ids(1);
  entry.set_sample(sample);
  return step;
}

class SequenceSpansTest : public ::testing::Test {
 protected:
  SequenceSpansTest() : metrics_(*common::Metrics::Create("")) {
    common::Tracer::Options options;
    options.endpoint = collector_.address();
    options.interval = absl::Hours(1);
    options.flush_timeout = absl::Seconds(30);
    tracer_ = *common::Tracer::Create(options, metrics_.get());
  }

  void Do(SequenceSpans& spans, const v1::Step& step, bool own = false) { spans.OnStepDone(spans.OnStep(step, own)); }

  // "NAME TOKENS", in the order in which they ended.
  std::vector<std::string> Ended() {
    tracer_ = nullptr;
    std::vector<std::string> names;
    for (const auto& one : collector_.spans()) {
      const std::string tokens = one.Attribute("rwkv.tokens");
      names.push_back(tokens.empty() ? one.span.name() : absl::StrCat(one.span.name(), " ", tokens));
    }
    return names;
  }

  SpanCollector collector_;
  std::unique_ptr<common::Metrics> metrics_;
  std::unique_ptr<common::Tracer> tracer_;
};

TEST_F(SequenceSpansTest, StepsOfOneKindAreOneSpan) {
  SequenceSpans spans(tracer_.get());
  spans.OnAttach(Attach(3, 7, kParent));
  spans.OnAttached(3, 7, absl::OkStatus());
  Do(spans, Step(3, 7, 5, false));
  Do(spans, Step(3, 7, 4, true));
  Do(spans, Step(3, 7, 1, true));
  Do(spans, Step(3, 7, 1, true));
  for (int i = 0; i < 10; ++i) Do(spans, Step(3, 7, 1, true), /*own=*/true);
  v1::ReleaseSlot release;
  release.set_slot(3);
  release.set_sequence(7);
  spans.OnRelease(release);
  Do(spans, Step(3, 7, 1, true));  // Nobody's any more.
  EXPECT_THAT(Ended(), ElementsAre("worker.attach", "worker.prefill 9", "worker.decode 2", "worker.lease 10"));
}

TEST_F(SequenceSpansTest, ASaveEndsWhatCameBefore) {
  SequenceSpans spans(tracer_.get());
  spans.OnAttach(Attach(0, 1, kParent));
  spans.OnAttached(0, 1, absl::OkStatus());
  Do(spans, Step(0, 1, 2, true));
  v1::SaveSnapshot save;
  save.set_sequence(1);
  spans.OnSave(save)->SetError("the store is away");
  Do(spans, Step(0, 1, 1, true));
  spans.Clear();
  EXPECT_THAT(Ended(), ElementsAre("worker.attach", "worker.prefill 2", "worker.save", "worker.decode 1"));
  EXPECT_EQ(collector_.spans()[2].span.status().message(), "the store is away");
}

TEST_F(SequenceSpansTest, AnotherSequenceInTheSlotEndsTheOneBefore) {
  SequenceSpans spans(tracer_.get());
  spans.OnAttach(Attach(0, 1, kParent));
  spans.OnAttached(0, 1, absl::OkStatus());
  Do(spans, Step(0, 1, 2, true));
  spans.OnAttach(Attach(0, 2, ""));
  spans.OnAttached(0, 2, absl::OkStatus());
  Do(spans, Step(0, 2, 5, true));
  EXPECT_THAT(Ended(), ElementsAre("worker.attach", "worker.prefill 2"));
}

TEST_F(SequenceSpansTest, AKeptStateIsNamed) {
  SequenceSpans spans(tracer_.get());
  for (const uint64_t sequence : {1, 2}) {
    v1::AttachSequence attach = Attach(0, sequence, kParent);
    attach.mutable_snapshot()->set_snapshot_id("x");
    attach.clear_fresh();
    spans.OnAttach(attach);
    if (sequence == 2) spans.OnKept(0, 2);
    spans.OnAttached(0, sequence, absl::OkStatus());
  }
  spans.Clear();
  EXPECT_THAT(Ended(), ElementsAre("worker.attach", "worker.attach"));
  EXPECT_EQ(collector_.spans()[0].Attribute("rwkv.kept"), "");
  EXPECT_EQ(collector_.spans()[1].Attribute("rwkv.kept"), "1");
  EXPECT_EQ(collector_.spans()[1].Attribute("rwkv.source"), "snapshot");
}

// The state of the one before is still on its way: its span ends with its slot.
TEST_F(SequenceSpansTest, AnAttachOverAnotherEndsThatOnesSpan) {
  SequenceSpans spans(tracer_.get());
  spans.OnAttach(Attach(0, 1, kParent));
  spans.OnAttach(Attach(0, 2, kParent));
  spans.OnAttached(0, 1, absl::OkStatus());  // Too late.
  spans.OnAttached(0, 2, absl::OkStatus());
  Do(spans, Step(0, 2, 5, true));
  spans.Clear();
  EXPECT_THAT(Ended(), ElementsAre("worker.attach", "worker.attach", "worker.prefill 5"));
}

TEST_F(SequenceSpansTest, AnAttachThatFailsSaysWhy) {
  SequenceSpans spans(tracer_.get());
  spans.OnAttach(Attach(0, 1, kParent));
  spans.OnAttached(0, 1, absl::DataLossError("damaged"));
  Do(spans, Step(0, 1, 2, true));
  EXPECT_THAT(Ended(), ElementsAre("worker.attach"));
  EXPECT_EQ(collector_.spans()[0].span.status().message(), "DATA_LOSS: damaged");
}

TEST_F(SequenceSpansTest, WithoutATracerOrAWishThereIsNothing) {
  SequenceSpans none(nullptr);
  none.OnAttach(Attach(0, 1, kParent));
  EXPECT_THAT(none.OnStep(Step(0, 1, 2, true), false), IsEmpty());
  SequenceSpans spans(tracer_.get());
  spans.OnAttach(Attach(0, 1, "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"));
  EXPECT_THAT(spans.OnStep(Step(0, 1, 2, true), false), IsEmpty());
  EXPECT_EQ(spans.OnSave({}), nullptr);
  EXPECT_THAT(Ended(), IsEmpty());
}

}  // namespace
}  // namespace rwkv::worker
