// What a runner says of the sequences that are traced: whose spans begin and end with which commands
// (sequence_spans_test has the rest).
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/metrics.h"
#include "services/common/tracing/tracer.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/runner_fixture.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/span_collector.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::ElementsAre;

class StageRunnerTracesTest : public RunnerFixture {
 protected:
  StageRunnerTracesTest() : metrics_(*common::Metrics::Create("")) {
    common::Tracer::Options options;
    options.endpoint = collector_.address();
    options.interval = absl::Hours(1);
    options.flush_timeout = absl::Seconds(30);
    tracer_ = *common::Tracer::Create(options, metrics_.get());
    options_.tracer = tracer_.get();
    options_.kept_state_bytes = 1 << 20;
  }
  ~StageRunnerTracesTest() override { stages_.clear(); }

  static v1::AttachSequence Traced(v1::AttachSequence attach) {
    attach.set_trace_parent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    return attach;
  }
  static v1::AttachSequence Fresh(int slot, uint64_t sequence) {
    v1::AttachSequence attach;
    attach.set_slot(slot);
    attach.set_sequence(sequence);
    attach.set_fresh(true);
    return Traced(attach);
  }
  // "NAME TOKENS", in the order in which they ended; of attaches what they began with.
  std::vector<std::string> Ended() {
    EXPECT_TRUE(stages_[0].transfer->WaitUntilSaved(absl::Now() + absl::Seconds(30)));
    stages_.clear();
    clients_.clear();
    options_.tracer = nullptr;
    tracer_ = nullptr;
    std::vector<std::string> names;
    for (const auto& one : collector_.spans()) {
      std::string name = one.span.name();
      for (const char* key : {"rwkv.tokens", "rwkv.source", "rwkv.kept"}) {
        if (const std::string value = one.Attribute(key); !value.empty()) absl::StrAppend(&name, " ", value);
      }
      if (!one.span.status().message().empty()) name += " failed";
      names.push_back(name);
    }
    return names;
  }

  rwkv::testing::SpanCollector collector_;
  std::unique_ptr<common::Metrics> metrics_;
  std::unique_ptr<common::Tracer> tracer_;
};

TEST_P(StageRunnerTracesTest, CommandsAndStepsBeginAndEndSpans) {
  Start(1);
  {
    PipelineDriver driver(clients_);
    ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
    ASSERT_THAT(driver.Attach(Fresh(0, 1)), IsOk());
    v1::Step step;
    *step.add_entries() = Entry(0, 1, 0, tokens_, false, true);
    step.mutable_entries(0)->set_go_on_until(tokens_.size() + 2);
    ASSERT_THAT(driver.WriteStep(std::move(step)), IsOk());
    for (int results = 0; results < 3; ++results) ASSERT_THAT(driver.stream(0).Read(), IsOk());
    const absl::StatusOr<v1::SnapshotManifest> manifest =
        driver.Save(0, 1, tokens_.size() + 2, "snap", kTestFingerprint, /*keep=*/true);
    ASSERT_THAT(manifest, IsOk());
    ASSERT_THAT(driver.Feed(0, 1, tokens_.size() + 2, {4}, false, true), IsOk());
    ASSERT_THAT(driver.Release(0, 1), IsOk());
    // What is kept, what is read, what is not there.
    v1::AttachSequence attach = Traced(FromSnapshot(1, 2, *manifest));
    attach.set_keep(true);
    ASSERT_THAT(driver.Attach(attach), IsOk());
    attach.set_keep(false);
    ASSERT_THAT(driver.Attach(attach), IsOk());
    attach.mutable_snapshot()->set_snapshot_id("none");
    for (v1::RecordInfo& record : *attach.mutable_snapshot()->mutable_records()) record.set_snapshot_id("none");
    EXPECT_FALSE(driver.Attach(attach).ok());
    attach.set_slot(99);
    EXPECT_FALSE(driver.Attach(attach).ok());
    ASSERT_THAT(driver.Attach(Fresh(2, 3)), IsOk());
    ASSERT_THAT(driver.Feed(2, 3, 0, {5, 6}), IsOk());
  }
  ASSERT_TRUE(stages_[0].runner->WaitUntilIdle(absl::Now() + absl::Seconds(30)));
  EXPECT_THAT(Ended(), ElementsAre("worker.attach fresh", "worker.prefill 11", "worker.lease 2", "worker.save",
                                   "worker.decode 1", "worker.attach snapshot 1", "worker.attach snapshot",
                                   "worker.attach snapshot failed", "worker.attach snapshot failed",
                                   "worker.attach fresh", "worker.prefill 2"));
}

TEST_P(StageRunnerTracesTest, ASaveThatFailsSaysSo) {
  Start(1);
  {
    PipelineDriver driver(clients_);
    ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
    ASSERT_THAT(driver.Attach(Fresh(0, 1)), IsOk());
    EXPECT_FALSE(driver.Save(0, 1, 0, "snap", kTestFingerprint).ok()) << "there is no store";
  }
  ASSERT_TRUE(stages_[0].runner->WaitUntilIdle(absl::Now() + absl::Seconds(30)));
  EXPECT_THAT(Ended(), ElementsAre("worker.attach fresh", "worker.save failed"));
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerTracesTest, ::testing::Values("auto"),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
