// The core with events in an order that a test gives, step by step.
#include "services/router/core/turn_core.h"

#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/metrics.h"
#include "services/common/sampling/sampling_params.h"
#include "services/router/core/call_kinds.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/scripted_world.h"
#include "services/router/testing/fake_cluster.h"
#include "services/state_store/client/fake_state_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class TurnCoreTest : public ::testing::Test {
 protected:
  TurnCoreTest()
      : metrics_(*common::Metrics::Create("")),
        router_metrics_(metrics_.get()),
        store_(*state_store::FakeStateStore::Create(&clock_)),
        core_(Options(), &world_, store_.get(), &router_metrics_) {
    auto model = std::make_shared<ServingModel>();
    model->info.set_name("model");
    model->info.set_fingerprint("f");
    model->info.set_vocab_size(1000);
    world_.model = std::move(model);
    v1::CreateSessionRequest create;
    create.set_session_id("s");
    EXPECT_THAT(store_->CreateSession(create, absl::Now() + kTestLimit), IsOk());
  }

  static TurnOptions Options() {
    TurnOptions options;
    options.router = "router-0";
    options.incarnation = "1";
    options.slot_quantum = absl::Hours(1);
    options.max_wait = absl::Hours(2);
    return options;
  }

  // A lane of one worker with one slot.
  StagePlan Plan(const std::string& numeric_family = "") const {
    StagePlan plan;
    plan.model = world_.model->info;
    plan.slots = 1;
    plan.max_batch_rows = 128;
    plan.stages.emplace_back();
    plan.stages.back().address = "worker";
    plan.stages.back().worker.set_slots(1);
    plan.stages.back().worker.set_numeric_family(numeric_family);
    return plan;
  }

  // The core and the store do all that they can. Commands that were sent meanwhile.
  std::vector<ScriptedWorld::Command> Settle() {
    do {
      core_.Sweep();
    } while (world_.RunJobs());
    return std::exchange(world_.commands, {});
  }

  // Ten tokens in, up to a hundred out. `session_id` empty: of none.
  FakeCluster::Call Arrive(const std::string& session_id) {
    FakeCluster::Call call;
    call.id = ++calls_;
    auto turn = std::make_shared<Turn>();
    turn->kind = std::make_unique<GenerateCall>(call.stream);
    turn->call = call.id;
    turn->model = world_.model;
    turn->session_id = session_id;
    turn->request_id = "a";
    turn->prompt.resize(10);
    std::iota(turn->prompt.begin(), turn->prompt.end(), 1);
    turn->spec.set_max_tokens(100);
    *turn->spec.mutable_sampling() = common::CompleteSampling(v1::Sampling(), 7);
    turn->arrival = world_.now;
    core_.Arrive(turn);
    return call;
  }

  // The slot that `commands` ask for is there. Returns what is fed to it.
  v1::Step Attach(const std::vector<ScriptedWorld::Command>& commands) {
    EXPECT_EQ(commands.size(), 1);
    EXPECT_TRUE(commands[0].request->has_attach());
    sequence_ = commands[0].request->attach().sequence();
    v1::ExecuteResponse answer;
    answer.mutable_attached()->set_sequence(sequence_);
    core_.Handle(commands[0].epoch, 0, answer);
    const std::vector<ScriptedWorld::Command> fed = Settle();
    EXPECT_EQ(fed.size(), 1);
    EXPECT_TRUE(fed[0].request->has_step());
    return fed[0].request->step();
  }

  void Answer(uint64_t epoch, uint64_t step_id, uint64_t position, const absl::Status& status = absl::OkStatus()) {
    v1::ExecuteResponse answer;
    answer.mutable_step()->set_step_id(step_id);
    v1::EntryResult& entry = *answer.mutable_step()->add_entries();
    entry.set_sequence(sequence_);
    entry.set_position(position);
    *entry.mutable_status() = common::ToStatusProto(status);
    if (status.ok()) entry.set_token_id(5);
    core_.Handle(epoch, 0, answer);
  }

  common::SystemClock clock_;
  ScriptedWorld world_;
  const std::unique_ptr<common::Metrics> metrics_;
  RouterMetrics router_metrics_;
  const std::unique_ptr<state_store::FakeStateStore> store_;
  TurnCore core_;
  CallId calls_ = 0;
  uint64_t sequence_ = 0;  // Attached last.
};

// It stands still until its worker says where it is; that one refuses it instead, and there is no other lane.
TEST_F(TurnCoreTest, ATurnWithoutAClientThatLosesItsSlotIsOverThoughThereIsNoLane) {
  core_.EpochUp(1, Plan());
  const FakeCluster::Call call = Arrive("s");
  const v1::Step step = Attach(Settle());
  ASSERT_GT(step.entries(0).go_on_until(), 10);
  Answer(1, step.step_id(), 10);
  Settle();
  core_.Cancel(call.id);
  const std::vector<ScriptedWorld::Command> commands = Settle();
  ASSERT_EQ(commands.size(), 1);
  ASSERT_TRUE(commands[0].request->has_go_on());
  EXPECT_EQ(commands[0].request->go_on().until(), 0);
  EXPECT_EQ(core_.counts().running, 1);
  core_.EpochClosing(1);
  Answer(1, 0, 11, absl::AbortedError("the slot is at another position"));
  Settle();
  EXPECT_EQ(core_.counts().running, 0) << "and with it its session is kept";
  v1::AcquireLeaseRequest acquire;
  acquire.set_session_id("s");
  acquire.set_holder("router-1");
  acquire.set_incarnation("1");
  acquire.mutable_ttl()->set_seconds(1);
  EXPECT_THAT(store_->AcquireLease(acquire, absl::Now() + kTestLimit), IsOk());
}

// How long it had waited for a slot is no part of how long it waits for a lane.
TEST_F(TurnCoreTest, ATurnThatFoundNoSlotWaitsForALaneAsLongAsOthers) {
  core_.EpochUp(1, Plan());
  core_.EpochUp(2, Plan());
  const FakeCluster::Call first = Arrive("");
  Attach(Settle());
  const FakeCluster::Call second = Arrive("");
  const std::vector<ScriptedWorld::Command> attach = Settle();
  Attach(attach);
  core_.EpochDown(attach[0].epoch, absl::UnavailableError("it is gone"));
  Settle();
  ASSERT_EQ(core_.counts().waiting, 1);
  world_.now += Options().outage_timeout + absl::Seconds(1);
  Settle();
  EXPECT_EQ(core_.counts().waiting, 1);
  core_.EpochDown(3 - attach[0].epoch, absl::UnavailableError("it is gone, too"));
  core_.Cancel(first.id);
  Settle();
  EXPECT_EQ(core_.counts().waiting, 0);
  EXPECT_EQ(core_.counts().running, 1);
  EXPECT_FALSE(second.stream->closed()) << second.stream->Wait();
  world_.now += Options().outage_timeout;
  Settle();
  EXPECT_FALSE(second.stream->closed());
  world_.now += absl::Milliseconds(1);
  Settle();
  ASSERT_TRUE(second.stream->closed());
  EXPECT_THAT(second.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no pipeline for 1m")));
}

// Its tokens are not to be those of other kernels, so it can end in no other way.
TEST_F(TurnCoreTest, WhoGaveItsSlotAwayIsToldThatItsNumericFamilyIsGone) {
  core_.EpochUp(1, Plan("fast"));
  const FakeCluster::Call first = Arrive("");
  Answer(1, Attach(Settle()).step_id(), 10);
  const FakeCluster::Call second = Arrive("");
  Settle();
  world_.now += Options().slot_quantum;
  const std::vector<ScriptedWorld::Command> halt = Settle();
  ASSERT_EQ(halt.size(), 1);
  ASSERT_TRUE(halt[0].request->has_go_on());
  v1::ExecuteResponse stopped;
  stopped.mutable_stopped()->set_sequence(sequence_);
  stopped.mutable_stopped()->set_position(10);
  core_.Handle(1, 0, stopped);
  Settle();
  ASSERT_EQ(core_.counts().waiting, 1);
  core_.EpochUp(2, Plan("plain"));
  core_.PoolsSeen({PoolName("f", "plain")});
  Settle();
  EXPECT_FALSE(first.stream->closed());
  core_.EpochDown(1, absl::UnavailableError("it is gone"));
  Settle();
  for (const FakeCluster::Call& call : {first, second}) {
    ASSERT_TRUE(call.stream->closed());
    EXPECT_THAT(call.stream->Wait(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("numeric family")));
  }
  EXPECT_EQ(core_.counts().waiting, 0);
}

}  // namespace
}  // namespace rwkv::router
