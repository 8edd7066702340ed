// What an event costs must not grow with the turns that it is none of: a token of a turn that runs, beside many that
// wait for the store, for their worker or for their client, and behind them a long line.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/metrics.h"
#include "services/common/sampling/sampling_params.h"
#include "services/router/core/core_testing.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/scripted_world.h"
#include "services/router/core/turn_core.h"

namespace rwkv::router {
namespace {

constexpr int kRunning = 16;
constexpr int kEvents = 4000;

// A core with one lane, in which there is a slot for each of its live turns.
class BusyCore {
 public:
  BusyCore(int live, int waiting) : core_(Options(live, waiting), &world_, nullptr, &metrics_) {
    model_->info.set_fingerprint("f");
    world_.model = model_;
    StagePlan plan;
    plan.model = model_->info;
    plan.slots = live;
    plan.max_batch_rows = 128;
    plan.stages.resize(1);
    core_.EpochUp(1, plan);
    for (int i = 0; i < kRunning; ++i) running_.push_back(Arrive(""));
    Settle();
    for (int i = kRunning; i < live; ++i) {
      if (i % 3 == 0) {
        Arrive("session-" + std::to_string(i));  // Waits for the store.
      } else {
        const auto stream = Arrive("");            // Waits for its worker,
        if (i % 3 == 1) stuck_.push_back(stream);  // or for its client.
      }
      core_.Sweep();
    }
    Settle();
    // Two messages wait for each of those clients: there is no room for a third.
    for (int i = 0; i < 3; ++i) {
      for (const std::shared_ptr<HeldStream>& stream : stuck_) Draw(stream);
    }
    for (int i = 0; i < waiting; ++i) Arrive("");
    Settle();
    EXPECT_EQ(core_.counts().running, live);
    EXPECT_EQ(core_.counts().waiting, waiting);
  }

  // Processor time of a token: it comes, goes to its client, and what follows is settled. `all`: by the plain twin.
  double MicrosecondsPerToken(bool all = false) {
    const int events = all ? kEvents / 100 : kEvents;
    const std::clock_t begin = std::clock();
    for (int i = 0; i < events; ++i) {
      if (all) core_.Touch();
      world_.now += absl::Microseconds(1);
      const std::shared_ptr<HeldStream>& stream = running_[i % kRunning];
      Draw(stream);
      stream->Take();
      stream->sent.clear();
      stream->taken = 0;
    }
    world_.commands.clear();
    return 1e6 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC / events;
  }

 private:
  struct Where {
    uint64_t sequence = 0;
    uint64_t position = 0;
  };

  static TurnOptions Options(int live, int waiting) {
    TurnOptions options;
    options.max_running = live;
    options.max_waiting = waiting;
    options.max_stream_messages = 2;
    options.slot_quantum = absl::Hours(1);
    return options;
  }

  std::shared_ptr<HeldStream> Arrive(const std::string& session) {
    auto stream = std::make_shared<HeldStream>();
    auto turn = std::make_shared<Turn>();
    turn->kind = std::make_unique<GenerateCall>(stream);
    turn->call = ++calls_;
    turn->model = model_;
    turn->session_id = session;
    turn->request_id = "a";
    turn->prompt = {1, 2, 3};
    turn->spec.set_max_tokens(1 << 30);
    *turn->spec.mutable_sampling() = common::CompleteSampling(v1::Sampling(), 7);
    turn->arrival = world_.now;
    arrived_.push_back({turn, stream});
    core_.Arrive(turn);
    return stream;
  }

  // The lane does what it was told; what the store was asked lies there.
  void Settle() {
    core_.Sweep();
    while (!world_.commands.empty()) {
      for (const ScriptedWorld::Command& command : std::exchange(world_.commands, {})) {
        v1::ExecuteResponse answer;
        if (command.request->has_attach()) {
          answer.mutable_attached()->set_sequence(command.request->attach().sequence());
        } else if (command.request->has_step()) {
          const v1::Step& step = command.request->step();
          answer.mutable_step()->set_step_id(step.step_id());
          for (const v1::StepEntry& entry : step.entries()) {
            v1::EntryResult& result = *answer.mutable_step()->add_entries();
            result.set_sequence(entry.sequence());
            result.set_position(entry.expected_position() + entry.token_ids_size());
          }
          // Without a token: that is drawn later, as by a worker that goes on by itself.
        } else {
          continue;
        }
        core_.Handle(1, 0, answer);
      }
      core_.Sweep();
    }
    for (const auto& [turn, stream] : arrived_) {
      if (turn->sequence != 0 && at_.count(stream.get()) == 0) at_[stream.get()] = {turn->sequence, 3};
    }
  }

  void Draw(const std::shared_ptr<HeldStream>& stream) {
    Where& where = at_.at(stream.get());
    v1::ExecuteResponse answer;
    v1::EntryResult& result = *answer.mutable_step()->add_entries();
    result.set_sequence(where.sequence);
    result.set_position(where.position++);
    result.set_token_id(5);
    core_.Handle(1, 0, answer);
    core_.Sweep();
  }

  ScriptedWorld world_;
  const std::unique_ptr<common::Metrics> registry_ = *common::Metrics::Create("");
  RouterMetrics metrics_{registry_.get()};
  const std::shared_ptr<ServingModel> model_ = std::make_shared<ServingModel>();
  TurnCore core_;
  CallId calls_ = 0;
  std::vector<std::pair<std::shared_ptr<Turn>, std::shared_ptr<HeldStream>>> arrived_;
  std::map<const HeldStream*, Where> at_;
  std::vector<std::shared_ptr<HeldStream>> running_, stuck_;
};

double Best(BusyCore& core) {
  double best = core.MicrosecondsPerToken();
  for (int i = 0; i < 8; ++i) best = std::min(best, core.MicrosecondsPerToken());
  return best;
}

TEST(TurnCostTest, ATokenCostsTheSameBesideAnyNumberOfTurns) {
  BusyCore few(64, 0);
  const double least = Best(few);
  std::printf("%5d turns, %5d calls wait: %.2f us a token\n", 64, 0, least);
  struct Case {
    int live, waiting;
  };
  for (const Case& one : {Case{1024, 0}, Case{8192, 0}, Case{64, 10000}, Case{8192, 10000}}) {
    BusyCore core(one.live, one.waiting);
    const double cost = Best(core);
    std::printf("%5d turns, %5d calls wait: %.2f us a token\n", one.live, one.waiting, cost);
    std::printf("      looking at all of them: %.2f us\n", core.MicrosecondsPerToken(true));
    EXPECT_LT(cost, 3 * least) << one.live << " turns, " << one.waiting << " calls wait";
  }
}

}  // namespace
}  // namespace rwkv::router
