// A router: the real core and assembly, with virtual time around them.
#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(50);
constexpr absl::Duration kPoll = absl::Milliseconds(250);
constexpr absl::Duration kSilence = absl::Seconds(2);
constexpr absl::Duration kWorkerTimeout = absl::Seconds(1);
constexpr absl::Duration kClosingTimeout = absl::Seconds(2);

}  // namespace

int Cluster::AnyRouter() {
  std::vector<int> there;
  for (size_t i = 0; i < routers.size(); ++i) {
    if (routers[i]->serving() && !routers[i]->paused()) there.push_back(static_cast<int>(i));
  }
  return there.empty() ? static_cast<int>(Draw() % routers.size()) : there[Draw() % there.size()];
}

SimRouter::SimRouter(Cluster* cluster, int index) : cluster_(cluster), name_(absl::StrCat("router-", index)) {}

void SimRouter::Boot() {
  ++life_;
  paused_ = false;
  router::TurnOptions options = cluster_->turn_options;
  options.router = name_;
  if (cluster_->options.broken.core_queues_all) options.max_waiting = 1000;
  if (cluster_->options.broken.core_floods_clients) options.max_stream_messages = 1000;
  options.incarnation = absl::StrCat(life_);
  assembly_ = std::make_unique<router::Assembly>(name_);
  unheard_.clear();
  core = std::make_unique<router::TurnCore>(options, this, &cluster_->store, cluster_->metrics);
  Deliver(cluster_->Between(absl::ZeroDuration(), kPoll), [this] { PollOn(); });
  Tick();
}

void SimRouter::Die() {
  if (!alive()) return;
  if (jobs_.count(life_) > 0) zombies_[life_] = std::move(core);
  core = nullptr;
  inbox_.clear();
  paused_ = false;
  for (auto& [epoch, lane] : lanes) {
    for (const int worker : lane.workers) {
      if (cluster_->workers[worker].epoch != lane.name) continue;
      cluster_->workers[worker].driver.clear();
      cluster_->workers[worker].epoch.clear();
    }
  }
  lanes.clear();
}

void SimRouter::Pause(bool paused) {
  if (!alive() || paused_ == paused) return;
  paused_ = paused;
  if (paused) return;
  std::deque<std::function<void()>> inbox;
  inbox.swap(inbox_);
  for (std::function<void()>& event : inbox) Deliver(absl::ZeroDuration(), std::move(event));
}

void SimRouter::Deliver(absl::Duration delay, std::function<void()> event) {
  cluster_->time.After(delay, [this, life = life_, event = std::move(event)]() mutable {
    if (!alive() || life != life_) return;
    if (paused_) {
      inbox_.push_back(std::move(event));
      return;
    }
    event();
    if (!alive() || life != life_) return;
    if (cluster_->options.looks_at_all) core->Touch();
    core->Sweep();
  });
}

void SimRouter::Tick() {
  Deliver(kTick, [this] { Tick(); });
}

void SimRouter::PollOn() {
  Poll();
  Deliver(kPoll, [this] { PollOn(); });
}

absl::Time SimRouter::Now() { return cluster_->time.Now() + clock_offset_; }

uint64_t SimRouter::Random() { return cluster_->Draw(); }

bool SimRouter::Run(Queue, std::function<void()> work) {
  Deliver(cluster_->StoreDelay(), [this, life = life_, work = std::move(work)] {
    const auto caller = std::make_pair(cluster_->caller, cluster_->caller_life);
    cluster_->caller = this;
    cluster_->caller_life = life;
    ++jobs_[life];
    work();  // If its calls come late, a lot happens in between; this router may die of it.
    if (--jobs_[life] == 0) {
      jobs_.erase(life);
      zombies_.erase(life);
    }
    std::tie(cluster_->caller, cluster_->caller_life) = caller;
  });
  return true;
}

void SimRouter::Post(std::function<void()> event) {
  const bool is_dead = cluster_->caller == this && cluster_->caller_life != life_;
  if (!is_dead) Deliver(absl::ZeroDuration(), std::move(event));
}

bool SimRouter::Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) {
  const auto it = lanes.find(epoch);
  if (it == lanes.end() || !it->second.up || it->second.over) return false;
  if (const absl::Status status = CheckCommand(*command); !status.ok()) {
    cluster_->Violated(absl::StrCat("B2: a worker is told of ", status.ToString()));
  }
  CheckPrefix(it->second, *command);
  cluster_->time.Mix(command->SerializeAsString());
  it->second.model->Send(command);
  return true;
}

void SimRouter::CheckPrefix(SimLane& lane, const v1::ExecuteRequest& command) {
  if (command.has_save() && command.save().keep()) {
    const auto owner = lane.owners.find(command.save().sequence());
    if (owner != lane.owners.end()) cluster_->prefix_owners[command.save().snapshot_id()] = owner->second;
  }
  if (!command.has_attach()) return;
  const v1::AttachSequence& attach = command.attach();
  const absl::optional<std::string> tenant = cluster_->TenantOf(attach.sampling().seed());
  if (!tenant.has_value()) return;
  const PrefixOwner own = {*tenant, cluster_->workers[lane.workers.front()].family};
  lane.owners[attach.sequence()] = own;
  const auto found = cluster_->prefix_owners.find(attach.snapshot().snapshot_id());
  if (!attach.keep() || found == cluster_->prefix_owners.end()) return;
  if (found->second.tenant != own.tenant) {
    cluster_->Violated(absl::StrCat("B3: a turn of ", own.tenant, " begins with a prefix of ", found->second.tenant));
  } else if (found->second.family != own.family) {
    cluster_->Violated("N1: a turn begins with a prefix of another numeric family");
  }
}

void SimRouter::Thawed(const std::string& epoch_name) {
  for (auto& [epoch, lane] : lanes) {
    if (lane.name == epoch_name && !lane.over) lane.model->Thawed();
  }
}

void SimRouter::EndEpoch(uint64_t epoch, const absl::Status& why) {
  const auto it = lanes.find(epoch);
  const bool is_given_away = it != lanes.end() && it->second.close_by != absl::InfiniteFuture();
  if (cluster_->lanes_are_sound() && !is_given_away) {
    cluster_->Violated(absl::StrCat("T3: a lane that works is given up: ", why.message()));
  }
  cluster_->time.After(absl::Microseconds(100), [this, life = life_, epoch, why] {
    if (life == life_) LaneLost(epoch, why);
  });
}

void SimRouter::LaneLost(uint64_t epoch, const absl::Status& why) {
  const auto it = lanes.find(epoch);
  if (it == lanes.end() || it->second.over) return;
  SimLane& lane = it->second;
  lane.over = true;
  for (const int worker : lane.workers) {
    if (cluster_->workers[worker].epoch != lane.name) continue;
    cluster_->workers[worker].driver.clear();
    cluster_->workers[worker].epoch.clear();
  }
  Deliver(absl::Milliseconds(1), [this, epoch, why, was_up = lane.up] {
    lanes.erase(epoch);
    if (was_up) core->EpochDown(epoch, why);
    Poll();
  });
}

void SimRouter::SetLoad(uint64_t epoch, const router::LaneLoad& load) {
  const auto it = lanes.find(epoch);
  if (it != lanes.end()) it->second.turns = load.turns;
}

absl::Status SimRouter::WhyNoLane() {
  for (const auto& [epoch, lane] : lanes) {
    if (lane.up && !lane.over) return absl::OkStatus();
  }
  return absl::UnavailableError("no lane");
}

bool SimRouter::OthersDrive(const std::string& pool) {
  for (const SimWorker& worker : cluster_->workers) {
    if (worker.driver.empty() || worker.driver == name_ || worker.dead || worker.frozen) continue;
    if (router::PoolName(worker.said.model().fingerprint(), worker.said.numeric_family()) == pool) return true;
  }
  return false;
}

std::shared_ptr<const router::ServingModel> SimRouter::FindModel(const std::string&) { return cluster_->model; }

void SimRouter::Poll() {
  const absl::Time now = cluster_->time.Now();
  cluster_->announced[name_] = now;
  std::vector<router::SeenWorker> seen;
  for (size_t i = 0; i < cluster_->workers.size(); ++i) {
    SimWorker& worker = cluster_->workers[i];
    const bool answers = !worker.dead && !worker.frozen;
    if (answers) {
      worker.heard[name_] = now;
      worker.said.set_driven_by(worker.driver);
      worker.said.set_epoch(worker.epoch);
      worker.said.set_driver_is_silent(!worker.driver.empty() && now - worker.heard[worker.driver] > kSilence);
      unheard_.erase(static_cast<int>(i));
    } else {
      unheard_.emplace(static_cast<int>(i), now);
    }
    uint64_t of_lane = 0;
    for (const auto& [epoch, lane] : lanes) {
      if (std::count(lane.workers.begin(), lane.workers.end(), i) > 0) of_lane = epoch;
    }
    seen.push_back({absl::StrCat("worker-", i), &worker.said, answers, of_lane});
    if (of_lane != 0 && !answers && now - unheard_[i] >= kWorkerTimeout) {
      LaneLost(of_lane, absl::UnavailableError("a worker says nothing"));
    }
  }
  std::vector<router::OwnLane> own;
  for (auto& [epoch, lane] : lanes) {
    if (now >= lane.close_by) LaneLost(epoch, absl::UnavailableError("given to another router"));
    if (!lane.over) own.push_back({epoch, lane.kind, lane.turns, lane.close_by != absl::InfiniteFuture()});
  }
  std::vector<std::string> wanting;
  for (const auto& [router, heard] : cluster_->announced) {
    if (now - heard <= absl::Seconds(1)) wanting.push_back(router);
  }
  router::Assembly::Decision decision = assembly_->Decide(seen, own, wanting, now);
  for (const uint64_t epoch : decision.give_away) {
    lanes.at(epoch).close_by = now + kClosingTimeout;
    core->EpochClosing(epoch);
  }
  for (const std::vector<int>& chain : decision.open) {
    Open(chain, router::PipelineKind(cluster_->workers[chain.front()].said));
  }
}

std::unique_ptr<ModelLane> SimRouter::MakeModel(uint64_t epoch, const std::vector<int>& chain) {
  const Broken& broken = cluster_->options.broken;
  ModelLane::Options options;
  options.stages = cluster_->stages;
  options.slots = cluster_->workers[chain.front()].said.slots();
  options.family = cluster_->workers[chain.front()].family;
  options.broken.keeps_foreign_states = broken.worker_keeps_states;
  options.broken.clears_nothing = broken.worker_clears_nothing;
  options.broken.saves_late = broken.worker_saves_late;
  options.broken.stops_in_silence = broken.worker_stops_in_silence;
  options.broken.feeds_unasked = broken.worker_feeds_unasked;
  options.broken.answers_early = broken.worker_answers_early;
  options.broken.checks_no_sums = broken.worker_checks_no_sums;
  ModelLane::World world;
  world.store = &cluster_->store;
  world.after = [this, life = life_, epoch](absl::Duration delay, std::function<void()> work) {
    cluster_->time.After(delay, [this, life, epoch, work = std::move(work)] {
      const auto it = lanes.find(epoch);
      if (life == life_ && it != lanes.end() && !it->second.over) work();
    });
  };
  world.draw_delay = [this] { return cluster_->Between(absl::Microseconds(50), absl::Milliseconds(1)); };
  world.is_frozen = [this, chain](int stage) { return cluster_->workers[chain[stage]].frozen; };
  world.answer = [this, epoch](int stage, v1::ExecuteResponse response) {
    Deliver(absl::ZeroDuration(),
            [this, epoch, stage, response = std::move(response)] { core->Handle(epoch, stage, response); });
  };
  world.kept = [this, chain](int stage) { return &cluster_->workers[chain[stage]].kept; };
  world.loses = [this] { return cluster_->LosesChunk(); };
  return std::make_unique<ModelLane>(options, std::move(world));
}

void SimRouter::Open(const std::vector<int>& chain, const std::string& kind) {
  const uint64_t epoch = ++last_epoch_;
  SimLane& lane = lanes[epoch];
  lane.name = absl::StrCat(name_, "/", life_, "/", epoch);
  lane.workers = chain;
  lane.kind = kind;
  lane.model = MakeModel(epoch, chain);
  // From the last stage to the first, a round trip each; who is refused lets go of all.
  Deliver(cluster_->NetworkDelay() * cluster_->stages, [this, epoch] {
    const auto it = lanes.find(epoch);
    if (it == lanes.end() || it->second.over) return;
    SimLane& opening = it->second;
    for (auto index = opening.workers.rbegin(); index != opening.workers.rend(); ++index) {
      SimWorker& worker = cluster_->workers[*index];
      const bool is_driven = !worker.driver.empty() && worker.driver != name_ &&
                             cluster_->time.Now() - worker.heard[worker.driver] <= kSilence;
      if (worker.dead || worker.frozen || worker.said.draining() ||
          (is_driven && !cluster_->options.broken.worker_has_two_drivers)) {
        return LaneLost(epoch, absl::UnavailableError("a worker refused"));
      }
      if (!cluster_->options.broken.worker_has_two_drivers) cluster_->LoseWorker(*index, "another epoch took over");
      worker.driver = name_;
      worker.epoch = opening.name;
    }
    for (const auto& router : cluster_->routers) {
      for (const auto& [id, other] : router->lanes) {
        if (&other == &opening || !other.up || other.over) continue;
        for (const int index : other.workers) {
          if (std::count(opening.workers.begin(), opening.workers.end(), index) > 0) {
            cluster_->Violated("a worker has two drivers");
          }
        }
      }
    }
    opening.up = true;
    router::StagePlan plan;
    plan.model = cluster_->workers[opening.workers.front()].said.model();
    plan.slots = cluster_->workers[opening.workers.front()].said.slots();
    plan.max_batch_rows = cluster_->workers[opening.workers.front()].said.max_batch_tokens();
    for (const int index : opening.workers) {
      plan.slots = std::min(plan.slots, cluster_->workers[index].said.slots());
      plan.stages.push_back({absl::StrCat("worker-", index), cluster_->workers[index].said, index});
    }
    core->EpochUp(epoch, plan);
  });
}

bool GivesUp(Cluster* cluster, const SimCall& call, absl::Time heard_at) {
  constexpr absl::Duration kPatience = absl::Seconds(3);
  SimRouter& router = *cluster->routers[call.router];
  if (!router.alive() || router.life() != call.router_life) return true;
  if (cluster->time.Now() - heard_at < kPatience) return false;
  router.Deliver(absl::Milliseconds(1), [&router, id = call.call] { router.core->Cancel(id); });
  return true;
}

}  // namespace rwkv::simulator
