#include "services/router/driver/driver.h"

#include <utility>

#include "absl/synchronization/notification.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::router {
namespace {

// A part of the time a drain has for running turns; the rest is for their snapshots.
constexpr double kDrainRunningShare = 0.7;

}  // namespace

TurnManager::Driver::Driver(const Options& options, Fleet::Options fleet_options, std::unique_ptr<WorkerSource> workers,
                            state_store::CatalogClient* catalog, std::vector<const tokenizer::Tokenizer*> tokenizers,
                            RouterMetrics* metrics, common::Clock* clock, std::function<uint64_t()> random)
    : options_(options),
      tokenizers_(std::move(tokenizers)),
      clock_(clock),
      random_(std::move(random)),
      core_(options, this, catalog, metrics),
      fleet_(WithAnnouncement(std::move(fleet_options)), std::move(workers), this),
      committer_(1, 4),
      // Every started turn has at most one job at a time, and each of its snapshots one.
      executor_(options.executor_threads, 4 * options.max_running + 64),
      snapshots_(options.executor_threads, 4 * options.max_running + 64) {
  EventLoop::Options loop_options;
  loop_options.max_requests = options.max_running + options.max_waiting + 64;
  loop_options.tick = options.tick;
  loop_ = std::make_unique<EventLoop>(loop_options, [this] { core_.Sweep(); });
}

TurnManager::Driver::~Driver() { Stop(); }

Fleet::Options TurnManager::Driver::WithAnnouncement(Fleet::Options options) {
  options.announce = [this, also = std::move(options.announce)](v1::RouterAnnouncement* router) {
    const Counts counts = core_.counts();
    router->set_draining(core_.draining());
    router->set_serving(core_.serving());
    router->set_running_turns(static_cast<uint32_t>(counts.running));
    router->set_waiting_turns(static_cast<uint32_t>(counts.waiting));
    router->set_tokens_per_second(counts.tokens_per_second);
    if (also) also(router);
  };
  return options;
}

void TurnManager::Driver::Stop() {
  {
    absl::MutexLock lock(&mu_);
    if (std::exchange(stopped_, true)) return;
  }
  core_.SetStopping();
  loop_->Post([this] { core_.Stop(); });
  executor_.Stop();
  committer_.Stop();
  snapshots_.Stop();
  fleet_.Stop();
  loop_->Stop();
}

void TurnManager::Driver::Drain(absl::Time deadline) {
  const absl::Time pause_at = Now() + (deadline - absl::Now()) * kDrainRunningShare;
  core_.SetDraining();
  loop_->Post([this, pause_at] { core_.BeginDrain(pause_at); });
  absl::MutexLock lock(&mu_);
  const bool idle = mu_.AwaitWithDeadline(absl::Condition(&idle_), deadline);
  common::LogInfo("drain_ended", {{"complete", idle}});
}

void TurnManager::Driver::Submit(const std::shared_ptr<Turn>& turn) {
  turn->arrival = Now();
  if (core_.draining()) return Reject(*turn, core_.DrainingStatus());
  if (loop_->TryPost([this, turn] { core_.Arrive(turn); })) return;
  Reject(*turn,
         common::WithRetryInfo(absl::ResourceExhaustedError("too many requests arrive at once"), options_.retry_delay));
}

void TurnManager::Driver::Cancel(CallId call) {
  loop_->Post([this, call] { core_.Cancel(call); });
}

bool TurnManager::Driver::Run(Queue queue, std::function<void()> work) {
  switch (queue) {
    case Queue::kStore:
      return executor_.TryRun(std::move(work));
    case Queue::kCommit:
      return committer_.TryRun(std::move(work));
    case Queue::kSnapshot:
      return snapshots_.TryRun(std::move(work));
  }
  return false;
}

void TurnManager::Driver::SetServing(bool serving) {
  if (options_.on_serving) options_.on_serving(serving);
}

void TurnManager::Driver::Drained() {
  absl::MutexLock lock(&mu_);
  idle_ = true;
}

ServingModel TurnManager::Driver::MakeModel(const v1::ModelInfo& info) const {
  return MakeServingModel(info, tokenizers_, options_.unusable_tokenizers);
}

std::shared_ptr<const ServingModel> TurnManager::Driver::model() const {
  absl::MutexLock lock(&mu_);
  return model_;
}

TurnManager::Models TurnManager::Driver::models() const {
  absl::MutexLock lock(&mu_);
  return models_;
}

std::shared_ptr<const ServingModel> TurnManager::Driver::FindModel(const std::string& fingerprint) {
  absl::MutexLock lock(&mu_);
  const auto it = models_.served.find(fingerprint);
  return it == models_.served.end() ? nullptr : it->second;
}

void TurnManager::Driver::PoolsDropped() {
  absl::MutexLock lock(&mu_);
  for (auto it = models_.served.begin(); it != models_.served.end();) {
    const bool is_over = models_.served.size() > 1 && it->second != model_ && !core_.KnowsModel(it->first);
    it = is_over ? models_.served.erase(it) : std::next(it);
  }
}

void TurnManager::Driver::OnEpochUp(uint64_t epoch, const StagePlan& plan) {
  auto model = std::make_shared<ServingModel>(MakeModel(plan.model));
  model->state_layout = plan.state_layout;
  loop_->Post([this, epoch, plan, model] {
    {
      // With the core's, in one order: pipelines come up side by side, and what the core did not know yet was taken for
      // a model that is over.
      absl::MutexLock lock(&mu_);
      model_ = model;
      models_.served[plan.model.fingerprint()] = model;
    }
    core_.EpochUp(epoch, plan);
    PoolsDropped();  // The last model that was served stays until there is another.
  });
}

void TurnManager::Driver::OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) {
  auto shared = std::make_shared<const v1::ExecuteResponse>(std::move(response));
  // The thread that read it goes on, up to the messages to clients: to wake another one costs more than the work.
  loop_->PostAndRun([this, epoch, stage, shared] { core_.Handle(epoch, stage, *shared); });
}

void TurnManager::Driver::OnEpochDown(uint64_t epoch, const absl::Status& why) {
  loop_->Post([this, epoch, why] { core_.EpochDown(epoch, why); });
}

void TurnManager::Driver::OnEpochClosing(uint64_t epoch) {
  loop_->Post([this, epoch] { core_.EpochClosing(epoch); });
}

void TurnManager::Driver::OnModelsSeen(const std::vector<Fleet::SeenModel>& models) {
  std::vector<std::string> pools;
  std::map<std::string, std::shared_ptr<const ServingModel>> seen;
  for (const Fleet::SeenModel& one : models) {
    pools.push_back(PoolName(one.model.fingerprint(), one.numeric_family));
    auto model = std::make_shared<ServingModel>(MakeModel(one.model));
    model->state_layout = one.state_layout;
    seen[one.model.fingerprint()] = std::move(model);
  }
  {
    absl::MutexLock lock(&mu_);
    models_.seen = std::move(seen);
  }
  loop_->Post([this, pools] { core_.PoolsSeen(pools); });
}

std::vector<TurnManager::LaneState> TurnManager::Driver::Lanes(absl::Time deadline) {
  struct Answer {
    std::vector<LaneState> lanes;
    absl::Notification come;
  };
  const auto answer = std::make_shared<Answer>();
  loop_->Post([this, answer] {
    answer->lanes = core_.Lanes();
    answer->come.Notify();
  });
  if (!answer->come.WaitForNotificationWithDeadline(deadline)) return {};
  return answer->lanes;
}

}  // namespace rwkv::router
