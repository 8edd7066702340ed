#include "services/router/pipeline/fleet.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::router {
namespace {

// An epoch that lasted this long was a good one: its workers are asked again at once.
constexpr absl::Duration kStableEpoch = absl::Seconds(5);
constexpr absl::Duration kLongestSleep = absl::Seconds(1);

}  // namespace

Fleet::Fleet(Options options, std::unique_ptr<WorkerSource> source, Listener* listener)
    : options_(std::move(options)),
      source_(std::move(source)),
      listener_(listener),
      look_again_(absl::InfiniteFuture()),
      assembly_(options_.lane.router) {
  why_not_.status = absl::UnavailableError("the pipeline is connecting");
  why_not_.text = "connecting";
}

Fleet::~Fleet() { Stop(); }

void Fleet::Start() {
  finder_ = std::thread([this] { Find(); });
  thread_ = std::thread([this] { Run(); });
}

void Fleet::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    for (auto& [epoch, open] : lanes_) open.lane->End(absl::CancelledError("the router stops"));
  }
  if (finder_.joinable()) finder_.join();
  if (thread_.joinable()) thread_.join();
  std::vector<std::unique_ptr<Lane>> lanes;
  {
    absl::MutexLock lock(&mu_);
    for (auto& [epoch, open] : lanes_) lanes.push_back(std::move(open.lane));
    lanes_.clear();
    why_not_.status = absl::UnavailableError("the router stops");
    why_not_.text = "stopped";
  }
  lanes.clear();
  absl::MutexLock lock(&mu_);
  const auto answered = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return asking_ == 0; };
  mu_.Await(absl::Condition(&answered));  // Each question has a deadline.
}

void Fleet::Wake() {
  absl::MutexLock lock(&mu_);
  woken_ = true;
}

void Fleet::Find() {
  while (true) {
    absl::StatusOr<std::vector<std::string>> list = source_->List();
    absl::MutexLock lock(&mu_);
    if (list.status() != list_status_ && !list.ok()) {
      common::LogWarning("workers_not_found", {{"status", list.status()}});
    }
    list_status_ = list.status();
    if (list.ok() && (!listed_ || *list != list_)) {
      list_ = *std::move(list);
      listed_ = list_changed_ = woken_ = true;
    }
    if (mu_.AwaitWithTimeout(absl::Condition(&stopping_), options_.find_interval)) return;
  }
}

void Fleet::Run() {
  while (true) {
    std::vector<std::unique_ptr<Lane>> ended;
    std::vector<std::shared_ptr<Worker>> asked;
    std::vector<Lane*> starting;
    std::vector<uint64_t> closing;
    absl::optional<std::vector<SeenModel>> models;
    {
      absl::MutexLock lock(&mu_);
      absl::Time next = std::min(look_again_, absl::Now() + kLongestSleep);
      for (const auto& [address, worker] : workers_) {
        if (!worker->asking) next = std::min(next, worker->next_ask);
      }
      const auto woken = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return woken_ || stopping_; };
      mu_.AwaitWithDeadline(absl::Condition(&woken), next);
      if (stopping_) return;
      woken_ = false;
      const absl::Time now = absl::Now();
      if (std::exchange(list_changed_, false)) TakeList();
      ended = TakeEndedLanes(now);
      EndSilentLanes(now);
      Decide(now, &starting, &closing);
      for (const auto& [address, worker] : workers_) {
        if (worker->asking || worker->next_ask > now) continue;
        if (worker->client == nullptr) worker->client = source_->Connect(address);
        asked.push_back(worker);
        BeginAsking(*worker);
      }
      std::vector<std::string> names;
      std::vector<SeenModel> seen;
      for (auto& [name, model] : ModelsSeen()) {
        names.push_back(name);
        seen.push_back(std::move(model));
      }
      if (names != models_) {
        models_ = std::move(names);
        models = std::move(seen);
      }
    }
    // Their threads have ended, or are about to.
    ended.clear();
    if (models.has_value()) listener_->OnModelsSeen(*models);
    for (const uint64_t epoch : closing) listener_->OnEpochClosing(epoch);
    for (Lane* lane : starting) lane->Start();
    for (const std::shared_ptr<Worker>& worker : asked) Ask(worker, absl::Now() + options_.ask_timeout, nullptr);
  }
}

void Fleet::TakeList() {
  for (auto& [address, worker] : workers_) worker->listed = false;
  for (const std::string& address : list_) {
    std::shared_ptr<Worker>& worker = workers_[address];
    if (worker == nullptr) {
      worker = std::make_shared<Worker>();
      worker->address = address;
      worker->backoff = options_.min_backoff;
      worker->status = absl::UnavailableError(absl::StrCat("worker ", address, ": not asked yet"));
      worker->silent_since = absl::InfiniteFuture();
    }
    worker->listed = true;
  }
}

std::vector<std::unique_ptr<Lane>> Fleet::TakeEndedLanes(absl::Time now) {
  std::vector<std::unique_ptr<Lane>> ended;
  for (auto it = lanes_.begin(); it != lanes_.end();) {
    OpenLane& open = it->second;
    const Lane::Phase phase = open.lane->phase();
    if (phase == Lane::Phase::kUp && !std::exchange(open.noticed_up, true)) why_not_.model = open.lane->plan().model;
    if (phase != Lane::Phase::kOver) {
      ++it;
      continue;
    }
    const absl::Status why = open.lane->why();
    State state;
    state.status = common::Annotate(why, "no pipeline serves just now");
    state.text = absl::StrCat("connecting: ", why.message());
    state.model = open.lane->was_up() ? open.lane->plan().model : why_not_.model;
    if (state.text != why_not_.text) {
      common::LogWarning("pipeline_down", {{"epoch", it->first}, {"status", why}});
    }
    why_not_ = std::move(state);
    for (auto& [address, worker] : workers_) {
      if (worker->lane != it->first) continue;
      worker->lane = 0;
      worker->answers = false;
      if (now - open.begin > kStableEpoch) worker->backoff = options_.min_backoff;
      worker->next_ask = now + (worker->backoff - options_.min_backoff);
      worker->backoff = std::min(2 * worker->backoff, options_.max_backoff);
    }
    ended.push_back(std::move(open.lane));
    it = lanes_.erase(it);
  }
  for (auto it = workers_.begin(); it != workers_.end();) {
    const bool is_gone = !it->second->listed && it->second->lane == 0 && !it->second->asking;
    it = is_gone ? workers_.erase(it) : std::next(it);
  }
  return ended;
}

void Fleet::EndSilentLanes(absl::Time now) {
  for (const auto& [address, worker] : workers_) {
    if (worker->lane == 0 || now - worker->silent_since < options_.worker_timeout) continue;
    lanes_.at(worker->lane)
        .lane->End(absl::UnavailableError(
            absl::StrCat("worker ", address, " says nothing for ", absl::FormatDuration(options_.worker_timeout))));
  }
  for (auto& [epoch, open] : lanes_) {
    if (now >= open.close_by) open.lane->End(absl::UnavailableError(open.closes_why));
  }
}

void Fleet::CloseDraining(absl::Time now, std::vector<uint64_t>* closing) {
  for (const auto& [address, worker] : workers_) {
    if (worker->lane == 0 || !worker->said.draining()) continue;
    OpenLane& open = lanes_.at(worker->lane);
    if (open.close_by != absl::InfiniteFuture() || open.lane->phase() != Lane::Phase::kUp) continue;
    open.close_by = now + options_.closing_timeout;
    open.closes_why = absl::StrCat("worker ", address, " drains");
    closing->push_back(worker->lane);
  }
}

void Fleet::Decide(absl::Time now, std::vector<Lane*>* starting, std::vector<uint64_t>* closing) {
  std::vector<SeenWorker> seen;
  for (const auto& [address, worker] : workers_) {
    seen.push_back(
        {address, worker->described ? &worker->said : nullptr, worker->answers && worker->listed, worker->lane});
  }
  CloseDraining(now, closing);
  std::vector<OwnLane> own;
  for (const auto& [epoch, open] : lanes_) {
    own.push_back({epoch, open.kind, open.load.turns, open.close_by != absl::InfiniteFuture()});
  }
  std::vector<std::string> wanting;
  for (auto it = routers_.begin(); it != routers_.end();) {
    const auto& [router, heard] = it->second;
    if (now - heard > kRouterRemembered) {
      it = routers_.erase(it);
      continue;
    }
    if (!router.draining()) wanting.push_back(router.name());
    ++it;
  }
  const Assembly::Decision decision = assembly_.Decide(seen, own, wanting, now);
  look_again_ = decision.look_again;
  wants_more_ = decision.wants_more;
  for (const uint64_t epoch : decision.give_away) {
    OpenLane& open = lanes_.at(epoch);
    open.close_by = now + options_.closing_timeout;
    open.closes_why = "given to another router";
    closing->push_back(epoch);
  }
  for (const std::vector<int>& chain : decision.open) {
    const absl::Status status = OpenChain(seen, chain, now, starting);
    if (status.ok()) continue;
    why_not_.status = status;
    why_not_.text = absl::StrCat("connecting: ", status.message());
  }
  if (lanes_.empty()) {
    State state = WhyNoLane();
    state.model = why_not_.model;
    why_not_ = std::move(state);
  }
}

absl::Status Fleet::OpenChain(const std::vector<SeenWorker>& seen, const std::vector<int>& chain, absl::Time now,
                              std::vector<Lane*>* starting) {
  std::vector<std::pair<std::string, v1::DescribeResponse>> described;
  std::vector<std::shared_ptr<worker::WorkerClient>> clients;
  for (const int i : chain) {
    described.emplace_back(seen[i].address, *seen[i].said);
    clients.push_back(workers_.at(seen[i].address)->client);
  }
  absl::StatusOr<StagePlan> plan = MakeStagePlan(described);
  if (!plan.ok()) return plan.status();
  const uint64_t epoch = ++last_epoch_;
  for (int stage = 0; stage < static_cast<int>(chain.size()); ++stage) {
    Worker& worker = *workers_.at(seen[chain[stage]].address);
    worker.lane = epoch;
    worker.stage_index = stage;
    worker.stage_count = static_cast<int>(chain.size());
  }
  OpenLane& open = lanes_[epoch];
  open.kind = PipelineKind(*seen[chain.front()].said);
  open.begin = now;
  open.lane =
      std::make_unique<Lane>(options_.lane, epoch, *std::move(plan), std::move(clients), listener_, [this] { Wake(); });
  starting->push_back(open.lane.get());
  return absl::OkStatus();
}

Fleet::State Fleet::WhyNoLane() const {
  std::vector<std::pair<std::string, v1::DescribeResponse>> free;
  std::set<std::string> drivers;
  absl::Status lost;
  for (const auto& [address, worker] : workers_) {
    if (!worker->status.ok()) {
      if (lost.ok()) lost = worker->status;
    } else if (worker->described && !IsFree(worker->said, options_.lane.router)) {
      drivers.insert(worker->said.driven_by());
    } else if (worker->described && worker->answers) {
      free.emplace_back(address, worker->said);
    }
  }
  State state;
  std::string prefix = "connecting: ";
  if (workers_.empty()) {
    state.status =
        absl::UnavailableError(listed_ || list_status_.ok() ? "no workers are known" : list_status_.message());
  } else if (!drivers.empty()) {  // What is free beside them are spares.
    prefix = "standing by: ";
    state.status = absl::UnavailableError(absl::StrCat("what there is is driven by ", absl::StrJoin(drivers, ", ")));
  } else if (!lost.ok()) {
    state.status = absl::UnavailableError(lost.message());
  } else if (free.size() + drivers.size() == 0) {
    return why_not_;  // They are just being asked.
  } else {
    state.status = MakeStagePlan(free).status();
    if (state.status.ok()) return why_not_;
  }
  state.text = absl::StrCat(prefix, state.status.message());
  state.status = common::Annotate(state.status, "no pipeline serves just now");
  return state;
}

std::map<std::string, Fleet::SeenModel> Fleet::ModelsSeen() const {
  std::map<std::string, SeenModel> models;
  for (const auto& [address, worker] : workers_) {
    if (!worker->described) continue;
    const v1::DescribeResponse& said = worker->said;
    SeenModel& model = models[absl::StrCat(said.model().fingerprint(), "/", said.numeric_family())];
    model.model = said.model();
    model.numeric_family = said.numeric_family();
    model.state_layout.assign(said.state_layout().begin(), said.state_layout().end());
  }
  return models;
}

void Fleet::BeginAsking(Worker& worker) {
  ++worker.asking;
  ++asking_;
}

void Fleet::Ask(const std::shared_ptr<Worker>& worker, absl::Time deadline,
                std::function<void(const absl::StatusOr<v1::DescribeResponse>&)> also) {
  std::shared_ptr<worker::WorkerClient> client;
  v1::DescribeRequest request;
  request.mutable_router()->set_name(options_.lane.router);
  {
    absl::MutexLock lock(&mu_);
    client = worker->client;
    const auto lane = lanes_.find(worker->lane);
    if (lane != lanes_.end() && worker->stage_index == 0) {
      const LaneLoad& load = lane->second.load;
      v1::LaneLoad* const told = request.mutable_router()->mutable_lane();
      told->set_turns(load.turns);
      told->set_slots_used(load.slots_used);
      told->set_slots_warm(load.slots_warm);
      told->set_rows_waiting(load.rows_waiting);
    }
  }
  if (options_.announce) options_.announce(request.mutable_router());
  // It stays while it is asked: its end is not for gRPC's thread.
  const auto done = [this, asked = worker.get(), also](const absl::StatusOr<v1::DescribeResponse>& answer) {
    if (also) also(answer);
    absl::MutexLock lock(&mu_);
    Answered(*asked, answer);
    --asking_;
    woken_ = true;
  };
  client->AskToDescribe(request, deadline, done);
}

void Fleet::Answered(Worker& worker, const absl::StatusOr<v1::DescribeResponse>& answer) {
  const absl::Time now = absl::Now();
  --worker.asking;
  worker.status = answer.status();
  worker.answers = answer.ok();
  if (answer.ok()) {
    worker.silent_since = absl::InfiniteFuture();
    worker.described = true;
    worker.said = *answer;
    for (const v1::RouterAnnouncement& router : answer->routers()) {
      if (router.name() != options_.lane.router) routers_[router.name()] = {router, now};
    }
  } else {
    worker.silent_since = std::min(worker.silent_since, now);
  }
  if (wants_more_) {
    worker.next_ask = now + std::min(worker.backoff, options_.ask_interval);
    worker.backoff = std::min(1.25 * worker.backoff, options_.max_backoff);
  } else {
    worker.next_ask = now + options_.ask_interval;
    worker.backoff = options_.min_backoff;
  }
}

bool Fleet::Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) {
  absl::MutexLock lock(&mu_);
  const auto it = lanes_.find(epoch);
  return it != lanes_.end() && it->second.lane->Send(command);
}

void Fleet::EndEpoch(uint64_t epoch, absl::Status why) {
  absl::MutexLock lock(&mu_);
  const auto it = lanes_.find(epoch);
  if (it != lanes_.end()) it->second.lane->End(std::move(why));
}

void Fleet::SetLoad(uint64_t epoch, const LaneLoad& load) {
  absl::MutexLock lock(&mu_);
  const auto it = lanes_.find(epoch);
  if (it != lanes_.end()) it->second.load = load;
}

}  // namespace rwkv::router
