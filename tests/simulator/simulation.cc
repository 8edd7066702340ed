#include "tests/simulator/simulation.h"

#include <google/protobuf/stubs/logging.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/common/logging.h"
#include "services/router/prefix_cache/prefix_ends.h"
#include "services/worker/client/fake_worker.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
namespace {

constexpr absl::Duration kFaultsUntil = absl::Seconds(12);
// Well beyond any time-out after the last fault: who has not ended by then never will.
constexpr absl::Duration kLongest = absl::Seconds(120);
constexpr uint64_t kMostEvents = 3000000;

constexpr const char* kKindNames[] = {"kill worker",   "freeze worker", "kill router",   "pause router", "store away",
                                      "lose answers",  "lose states",   "cancel call",   "two calls",    "slow client",
                                      "jump clock of", "drain worker",  "stick call of", "give up",      "lose chunks",
                                      "damage states", "strangers"};
constexpr int kKinds = 17;

// Steps may come late then.
bool StopsProcesses(Fault::Kind kind) {
  return kind == Fault::Kind::kKillWorker || kind == Fault::Kind::kFreezeWorker || kind == Fault::Kind::kKillRouter ||
         kind == Fault::Kind::kPauseRouter || kind == Fault::Kind::kJumpClock || kind == Fault::Kind::kStickCall;
}

// Shared by all simulations: making one takes longer than a short run.
router::RouterMetrics* Metrics() {
  static common::Metrics* const metrics = common::Metrics::Create("")->release();
  static auto* const router_metrics = new router::RouterMetrics(metrics);
  return router_metrics;
}

}  // namespace

std::string Fault::ToString() const {
  return absl::StrCat(kKindNames[static_cast<int>(kind)], " ", target, " at ", absl::FormatDuration(at), " for ",
                      absl::FormatDuration(lasts));
}

bool Timeline::Step() {
  if (events_.empty()) return false;
  auto first = events_.extract(events_.begin());
  now_ = first.key().first;
  Mix(absl::ToUnixNanos(now_) * 31 + first.key().second);
  ++steps_;
  first.mapped()();
  return true;
}

void Timeline::Mix(uint64_t value) { digest_ = (digest_ ^ value) * 0x100000001b3; }

void Timeline::Mix(absl::string_view bytes) {
  for (const char byte : bytes) Mix(static_cast<unsigned char>(byte));
}

Cluster::Cluster(const Options& options) : options(options), metrics(Metrics()), random_(options.seed) {
  const auto between = [this](int least, int most) { return least + static_cast<int>(random_() % (most - least + 1)); };
  stages = between(1, 3);
  families = random_() % 4 == 0 ? 2 : 1;
  const int pipelines = between(1, 3);
  const int slots = between(1, 3);
  const int spares = between(0, 2);
  for (int i = 0; i < pipelines * stages + spares; ++i) {
    SimWorker& worker = workers.emplace_back();
    const int stage = i < pipelines * stages ? i % stages : between(0, stages - 1);
    worker.family = i < pipelines * stages ? (i / stages) % families : between(0, families - 1);
    v1::DescribeResponse& said = worker.said;
    said.mutable_model()->set_name("model");
    said.mutable_model()->set_fingerprint("f");
    said.mutable_model()->set_layer_count(stages);
    said.mutable_model()->set_vocab_size(kVocabulary);
    said.set_first_layer(stage);
    said.set_end_layer(stage + 1);
    said.set_slots(slots);
    said.set_max_batch_tokens(8);
    said.set_numeric_family(options.broken.family_is_hidden ? "x" : absl::StrCat("family-", worker.family));
    said.set_kernels("simulated");
  }
  turn_options.max_running = random_() % 2 == 0 ? 16 : between(1, 3);
  turn_options.max_waiting = turn_options.max_running == 16 ? 16 : between(0, 2);
  turn_options.max_wait = absl::Seconds(20);
  turn_options.slot_quantum = absl::Milliseconds(300);
  turn_options.snapshot_interval_tokens = between(4, 12);
  turn_options.max_uncommitted_tokens = 8;
  turn_options.max_stream_messages = 4;
  turn_options.lease_ttl = absl::Seconds(3);
  turn_options.store_timeout = absl::Seconds(3);
  turn_options.progress_timeout = absl::Seconds(2);
  turn_options.attach_timeout = absl::Seconds(3);
  turn_options.save_timeout = absl::Seconds(3);
  turn_options.outage_timeout = absl::Seconds(8);
  turn_options.slow_client_timeout = absl::Seconds(2);
  turn_options.retry_delay = absl::Milliseconds(50);
  turn_options.limits.max_prompt_tokens = 64;
  turn_options.limits.max_generated_tokens = 64;
  turn_options.prefix_cache.enabled = random_() % 2 == 0;
  turn_options.prefix_cache.min_tokens = router::kShortestPrefix;
  turn_options.prefix_cache.chunk_tokens = between(5, 20);
  auto serving = std::make_shared<router::ServingModel>();
  serving->info = workers[0].said.model();
  model = std::move(serving);
  store.SetBroken(options.broken);
  const int router_count = between(1, 3);
  for (int i = 0; i < router_count; ++i) routers.push_back(std::make_unique<SimRouter>(this, i));
  const int sessions = between(1, 4);
  const bool has_tenants = random_() % 2 == 0;
  for (int i = 0; i < sessions; ++i) {
    const std::string tenant = has_tenants ? absl::StrCat("tenant-", i % 2) : "";
    clients.push_back(std::make_unique<SimClient>(this, i, tenant, between(1, 3), between(5, 25)));
    store.AddSession(clients.back()->session());
  }
  const int visitor_count = turn_options.prefix_cache.enabled ? between(1, 2) : between(0, 1);
  for (int i = 0; i < visitor_count; ++i) {
    const std::string tenant = has_tenants ? absl::StrCat("tenant-", i % 2) : "";
    visitors.push_back(std::make_unique<SimVisitor>(this, i, tenant, between(1, 5)));
  }
  const int caller_count = between(0, 1);
  for (int i = 0; i < caller_count; ++i) {
    const std::string tenant = has_tenants ? absl::StrCat("tenant-", i % 2) : "";
    callers.push_back(std::make_unique<SimCaller>(this, i, tenant, between(1, 5)));
  }
  store.SetMostPrefixes(between(2, 12));
  DrawFaults();
  store.SetFate([this] {
    if (stores_away_ > 0) return ModelStore::Fate::kNeverCame;
    if (answers_lost_ > 0 && Chance(0.3)) {
      return Chance(0.5) ? ModelStore::Fate::kAnswerLost : ModelStore::Fate::kNeverCame;
    }
    return ModelStore::Fate::kAnswered;
  });
  store.SetBeforeFence([this] { HoldCall(); });
}

void Cluster::HoldCall() {
  // One at a time: they end in the order of the stack.
  if (holds_call_ || caller == nullptr || !caller->call_sticks() || Chance(0.5)) return;
  absl::Time until = time.Now() + caller->TakeStuck();
  uint64_t takeovers = store.takeovers();
  holds_call_ = true;
  while (time.Now() < until && Step()) {
    // Who comes back just after another has taken over has the best chance of doing harm.
    if (std::exchange(takeovers, store.takeovers()) == store.takeovers()) continue;
    until = std::min(until, time.Now() + Between(absl::ZeroDuration(), absl::Milliseconds(100)));
  }
  holds_call_ = false;
}

absl::Duration Cluster::Between(absl::Duration least, absl::Duration most) {
  return least + absl::Nanoseconds(random_() % static_cast<uint64_t>(absl::ToInt64Nanoseconds(most - least)));
}

void Cluster::DrawFaults() {
  const int count = static_cast<int>(random_() % 9);
  for (int i = 0; i < count; ++i) {
    Fault& fault = faults_.emplace_back();
    fault.kind = static_cast<Fault::Kind>(random_() % kKinds);
    fault.at = Between(absl::ZeroDuration(), random_() % 2 == 0 ? absl::Milliseconds(300) : kFaultsUntil);
    fault.lasts = Between(absl::Milliseconds(1), absl::Seconds(random_() % 3 == 0 ? 9 : 1));
    fault.target = static_cast<int>(random_() % 64);
    if (fault.kind == Fault::Kind::kStickCall) fault.lasts = Between(absl::Seconds(1), absl::Seconds(9));
  }
}

void Cluster::Violated(const std::string& what) {
  if (!violation_.empty()) return;
  violation_ =
      absl::StrCat(what, " (after ", absl::FormatDuration(time.Now() - absl::FromUnixSeconds(1767225600)), ")");
}

absl::optional<std::string> Cluster::TenantOf(uint64_t seed) const {
  for (const auto& client : clients) {
    if (client->seed() == seed) return client->tenant();
  }
  for (const auto& visitor : visitors) {
    if (visitor->seed() == seed) return visitor->tenant();
  }
  return absl::nullopt;
}

void Cluster::LoseWorker(int worker, const std::string& why) {
  const std::string epoch = workers[worker].epoch;
  if (epoch.empty()) return;
  for (const auto& router : routers) {
    for (auto& [id, lane] : router->lanes) {
      if (lane.name == epoch) router->LaneLost(id, absl::UnavailableError(why));
    }
  }
}

// S1: a snapshot at position p is the state after exactly the first p tokens of the log.
void Cluster::CheckSnapshots() {
  for (const auto& [id, session] : store.sessions()) {
    for (const auto& [position, manifest] : session.snapshots) {
      if (position > session.log.size()) {
        return Violated(absl::StrCat("S1: a snapshot of ", id, " at ", position, " of a log of ", session.log.size()));
      }
      const uint64_t* const state = store.FindState(manifest.snapshot_id());
      if (state == nullptr || store.IsDamaged(manifest.snapshot_id())) continue;  // That costs time.
      uint64_t expected = worker::FakeModel::Fresh();
      for (uint64_t i = 0; i < position; ++i) expected = worker::FakeModel::Feed(expected, session.log[i]);
      if (*state != expected) {
        return Violated(absl::StrCat("S1: the snapshot of ", id, " at ", position, " is not the state after its log"));
      }
    }
  }
  for (const ModelStore::Prefix& prefix : store.prefixes()) {
    const uint64_t* const state = store.FindState(prefix.manifest.snapshot_id());
    if (state == nullptr || store.IsDamaged(prefix.manifest.snapshot_id())) continue;
    if (*state != worker::FakeModel::Feed(worker::FakeModel::Fresh(), prefix.tokens)) {
      return Violated(absl::StrCat("S1: a prefix of ", prefix.tokens.size(), " tokens is not the state after them"));
    }
  }
}

void Cluster::Inject(const Fault& fault) {
  SimWorker& worker = workers[fault.target % workers.size()];
  SimRouter& router = *routers[fault.target % routers.size()];
  SimClient& client = *clients[fault.target % clients.size()];
  switch (fault.kind) {
    case Fault::Kind::kKillWorker:
      worker.dead = true;
      LoseWorker(fault.target % static_cast<int>(workers.size()), "a worker was killed");
      worker.driver.clear();
      worker.epoch.clear();
      worker.kept.clear();
      return;
    case Fault::Kind::kFreezeWorker:
      worker.frozen = true;
      return;
    case Fault::Kind::kKillRouter:
      return router.Die();
    case Fault::Kind::kPauseRouter:
      return router.Pause(true);
    case Fault::Kind::kStoreAway:
      ++stores_away_;
      return;
    case Fault::Kind::kLoseAnswers:
      ++answers_lost_;
      return;
    case Fault::Kind::kLoseStates:
      return store.LoseStates([this] { return Chance(0.5); });
    case Fault::Kind::kCancelCall:
      return client.CancelCall();
    case Fault::Kind::kTwoCalls:
      return client.CallTwice();
    case Fault::Kind::kSlowClient:
      return client.Hold(true);
    case Fault::Kind::kJumpClock:
      return router.JumpClock(fault.lasts * (fault.target % 2 == 0 ? 1 : -1));
    case Fault::Kind::kDrainWorker:
      worker.said.set_draining(true);
      return;
    case Fault::Kind::kStickCall:
      return router.StickCall(fault.lasts);
    case Fault::Kind::kGiveUp:
      return client.GiveUp();
    case Fault::Kind::kLoseChunks:
      ++chunks_lost_;
      return;
    case Fault::Kind::kDamageStates:
      return store.DamageStates([this] { return Chance(0.5); });
    case Fault::Kind::kStrangers:
      ++strangers;
      return;
  }
}

void Cluster::Undo(const Fault& fault) {
  SimWorker& worker = workers[fault.target % workers.size()];
  SimRouter& router = *routers[fault.target % routers.size()];
  switch (fault.kind) {
    case Fault::Kind::kKillWorker:
      worker.dead = false;
      return;
    case Fault::Kind::kFreezeWorker:
      worker.frozen = false;
      for (const auto& one : routers) one->Thawed(worker.epoch);
      return;
    case Fault::Kind::kKillRouter:
      if (!router.alive()) router.Boot();
      return;
    case Fault::Kind::kPauseRouter:
      return router.Pause(false);
    case Fault::Kind::kStoreAway:
      --stores_away_;
      return;
    case Fault::Kind::kLoseAnswers:
      --answers_lost_;
      return;
    case Fault::Kind::kSlowClient:
      return clients[fault.target % clients.size()]->Hold(false);
    case Fault::Kind::kDrainWorker:
      worker.said.set_draining(false);
      return;
    case Fault::Kind::kLoseChunks:
      --chunks_lost_;
      return;
    case Fault::Kind::kStrangers:
      --strangers;
      return;
    default:
      return;
  }
}

bool Cluster::Step() {
  const auto is_done = [](const auto& one) { return one->done(); };
  const bool are_done = std::all_of(clients.begin(), clients.end(), is_done) &&
                        std::all_of(visitors.begin(), visitors.end(), is_done) &&
                        std::all_of(callers.begin(), callers.end(), is_done);
  if (!violation_.empty() || are_done || !time.Step()) return false;
  if (time.steps() - checked_ >= 64) {
    checked_ = time.steps();
    CheckSnapshots();
  }
  for (const auto& router : routers) CheckBounds(*router);
  if (time.Now() - begin_ > kLongest || time.steps() > kMostEvents) Violated("T3: a turn does not end");
  return true;
}

// B1: whoever does not fit is refused, and does not wait beside those who do.
void Cluster::CheckBounds(const SimRouter& router) {
  if (!router.alive()) return;
  const int waiting = router.core->counts().waiting;
  // Turns that gave their slot away are let in again, whatever comes.
  if (waiting > turn_options.max_waiting + turn_options.max_running) {
    Violated(absl::StrCat("B1: ", waiting, " calls wait at ", router.name()));
  }
}

Result Cluster::Run() {
  begin_ = time.Now();
  for (const auto& router : routers) router->Boot();
  for (const auto& client : clients) client->Start();
  for (const auto& visitor : visitors) visitor->Start();
  for (const auto& caller : callers) caller->Start();
  for (size_t i = 0; i < faults_.size(); ++i) {
    const auto& kept = options.faults;
    if (!options.all_faults && std::find(kept.begin(), kept.end(), static_cast<int>(i)) == kept.end()) continue;
    const Fault fault = faults_[i];
    lanes_are_sound_ &= !StopsProcesses(fault.kind);
    time.After(fault.at, [this, fault] { Inject(fault); });
    time.After(fault.at + fault.lasts, [this, fault] { Undo(fault); });
  }
  while (Step()) {
  }
  CheckSnapshots();
  for (const auto& client : clients) client->CheckLog();
  Result result;
  result.violation = violation_;
  result.faults = faults_;
  result.digest = time.digest();
  result.events = time.steps();
  result.tokens = tokens;
  result.reused_tokens = reused_tokens;
  result.time = time.Now() - begin_;
  result.longest_pause = longest_pause;
  return result;
}

Result Simulate(const Options& options) {
  common::MuteLog(true);
  const google::protobuf::LogSilencer silencer;  // Strangers' bytes are no news.
  return Cluster(options).Run();
}

std::vector<int> Shrink(const Options& options) {
  Options smaller = options;
  if (options.all_faults) {
    smaller.all_faults = false;
    const size_t count = Simulate(options).faults.size();
    for (size_t i = 0; i < count; ++i) smaller.faults.push_back(static_cast<int>(i));
  }
  for (bool is_smaller = true; is_smaller;) {
    is_smaller = false;
    for (size_t i = 0; i < smaller.faults.size(); ++i) {
      Options without = smaller;
      without.faults.erase(without.faults.begin() + i);
      if (Simulate(without).violation.empty()) continue;
      smaller = without;
      is_smaller = true;
      break;
    }
  }
  return smaller.faults;
}

std::string ReplayCommand(const Options& options) {
  std::string command = absl::StrCat("bazel run //tests/simulator -- --first_seed=", options.seed, " --seeds=1");
  if (!options.all_faults) absl::StrAppend(&command, " --faults=", absl::StrJoin(options.faults, ","));
  return command;
}

}  // namespace rwkv::simulator
