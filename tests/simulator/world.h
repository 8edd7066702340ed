// The pieces of a simulation: virtual time, and what stands in it. Used by simulation.cc and its parts alone.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_core.h"
#include "services/router/core/world.h"
#include "services/router/pipeline/assembly.h"
#include "services/router/pipeline/lane_load.h"
#include "services/router/pipeline/stage_plan.h"
#include "tests/simulator/model_lane.h"
#include "tests/simulator/model_store.h"
#include "tests/simulator/simulation.h"

namespace rwkv::simulator {

// Events in order of time, those of one time in the order in which they were made.
class Timeline : public common::Clock {
 public:
  absl::Time Now() override { return now_; }
  void At(absl::Time when, std::function<void()> event) {
    events_.emplace(std::make_pair(std::max(when, now_), next_++), std::move(event));
  }
  void After(absl::Duration delay, std::function<void()> event) { At(now_ + delay, std::move(event)); }
  // Runs the next event. False: there is none.
  bool Step();
  uint64_t digest() const { return digest_; }
  uint64_t steps() const { return steps_; }
  // What an event did is part of the run's digest, too: every command to a worker, all that a client hears.
  void Mix(uint64_t value);
  void Mix(absl::string_view bytes);

 private:
  absl::Time now_ = absl::FromUnixSeconds(1767225600);
  uint64_t next_ = 0;
  uint64_t steps_ = 0;
  uint64_t digest_ = 0xcbf29ce484222325;
  std::map<std::pair<absl::Time, uint64_t>, std::function<void()>> events_;
};

struct SimWorker {
  v1::DescribeResponse said;
  int family = 0;
  bool dead = false;
  bool frozen = false;
  bool draining = false;
  std::string driver;  // A router's name.
  std::string epoch;
  std::map<std::string, absl::Time> heard;  // When a router announced itself last.
  ModelLane::KeptStates kept;
};

class Cluster;

// Whom a state of the prefix cache may serve.
struct PrefixOwner {
  std::string tenant;
  int family = 0;
};

// A lane as its router holds it.
struct SimLane {
  std::string name;  // Of the epoch.
  std::vector<int> workers;
  std::string kind;
  std::unique_ptr<ModelLane> model;
  bool up = false;
  bool over = false;
  absl::Time close_by = absl::InfiniteFuture();
  int turns = 0;
  std::map<uint64_t, PrefixOwner> owners;  // By sequence: whose it is, if that is known.
};

// One router process; lives through several lives.
class SimRouter final : public router::World {
 public:
  SimRouter(Cluster* cluster, int index);

  void Boot();
  void Die();
  void Pause(bool paused);
  // Looks at the workers, opens and gives away lanes.
  void Poll();
  // Runs `event` on the router, unless it is dead or in another life by then; later, if it is paused.
  void Deliver(absl::Duration delay, std::function<void()> event);
  void LaneLost(uint64_t epoch, const absl::Status& why);
  void Thawed(const std::string& epoch_name);

  bool alive() const { return core != nullptr; }
  bool paused() const { return paused_; }
  const std::string& name() const { return name_; }
  bool serving() const { return alive() && core->serving(); }
  uint64_t life() const { return life_; }
  void JumpClock(absl::Duration by) { clock_offset_ += by; }
  // Its next call to the store, or one soon after, takes so long.
  void StickCall(absl::Duration lasts) { sticks_for_ = lasts; }
  absl::Duration TakeStuck() { return std::exchange(sticks_for_, absl::ZeroDuration()); }
  bool call_sticks() const { return sticks_for_ > absl::ZeroDuration(); }

  std::unique_ptr<router::TurnCore> core;
  std::map<uint64_t, SimLane> lanes;

  // World.
  absl::Time Now() override;
  absl::Time CallClock() override { return Now(); }
  uint64_t Random() override;
  void Post(std::function<void()> event) override;
  bool Run(Queue queue, std::function<void()> work) override;
  bool Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) override;
  void EndEpoch(uint64_t epoch, const absl::Status& why) override;
  void SetLoad(uint64_t epoch, const router::LaneLoad& load) override;
  absl::Status WhyNoLane() override;
  bool OthersDrive(const std::string& pool) override;
  std::shared_ptr<const router::ServingModel> FindModel(const std::string& fingerprint) override;
  void SetServing(bool) override {}
  void Drained() override {}
  void PoolsDropped() override {}

 private:
  void Tick();
  void PollOn();
  // B3, N1: a turn begins with a state of the prefix cache that one of its own tenant and numeric family left there.
  void CheckPrefix(SimLane& lane, const v1::ExecuteRequest& command);
  void Open(const std::vector<int>& chain, const std::string& kind);
  std::unique_ptr<ModelLane> MakeModel(uint64_t epoch, const std::vector<int>& chain);

  Cluster* const cluster_;
  const std::string name_;
  uint64_t life_ = 0;
  bool paused_ = false;
  std::deque<std::function<void()>> inbox_;  // While paused.
  absl::Duration clock_offset_;
  uint64_t last_epoch_ = 0;
  std::unique_ptr<router::Assembly> assembly_;
  std::map<int, absl::Time> unheard_;  // Workers that did not answer, since when.
  absl::Duration sticks_for_;
  std::map<uint64_t, int> jobs_;                                   // By life: store jobs on the stack.
  std::map<uint64_t, std::unique_ptr<router::TurnCore>> zombies_;  // Dead, and their jobs not yet.
};

// A call of somebody's at a router.
struct SimCall {
  int router = 0;
  uint64_t router_life = 0;
  router::CallId call = 0;
  bool over = false;
};
// Whether who calls gives up: the router has died, or has been silent for too long since `heard_at` and is told so.
bool GivesUp(Cluster* cluster, const SimCall& call, absl::Time heard_at);

// A session's client: turns one after the other, each until it is told whole.
class SimClient {
 public:
  // `tenant`: empty: of none.
  SimClient(Cluster* cluster, int index, const std::string& tenant, int turns, int tokens);
  void Start();
  bool done() const { return turn_ == turns_; }
  const std::string& session() const { return session_; }
  const std::string& tenant() const { return tenant_; }
  uint64_t seed() const { return 1000 + index_; }
  // T2, T3: the session's log is that of turns one after the other, each with the tokens of an undisturbed run; those
  // that were told whole are whole.
  void CheckLog();
  void CancelCall();
  void CallTwice();
  void GiveUp();
  void Hold(bool held);

 private:
  friend class SimStream;
  struct Attempt : SimCall {
    uint64_t number = 0;
    uint64_t first = 0;
    bool answered = false;  // Something was sent.
    std::weak_ptr<router::Turn> turn;
    absl::Time arrived = absl::InfiniteFuture();
  };

  void NextAttempt(absl::Duration pause);
  void HangUp();
  // After a turn: the next one, or first a way back.
  void GoOn();
  // Its session is cut at `position`, at whichever router does it; or it goes on with a fork from there.
  void Rewind(uint64_t position, absl::Duration pause);
  void Fork(uint64_t position, absl::Duration pause);
  // From now on its session's log is what `log` says, and what follows.
  void BeginAt(std::vector<uint32_t> log);
  std::shared_ptr<Attempt> Call(int router, uint64_t resume_from);
  // A message of an attempt is on its way, as its router sends it: what is durable by now may be shown.
  void CheckShown(const Attempt& attempt, const v1::GenerateResponse& message);
  // B1: a call that does not fit hears so at once, and when to come back.
  void CheckRefused(const Attempt& attempt, const absl::Status& status);
  // B3: the turn that goes by its name is its own, not one of another tenant whose session has the same name.
  void CheckOwn();
  // T3: it goes on before long, whatever befell whom.
  void CheckPause();
  void Heard(const std::shared_ptr<Attempt>& attempt, const v1::GenerateResponse& message);
  void Closed(const std::shared_ptr<Attempt>& attempt, const absl::Status& status);
  void Watch(const std::shared_ptr<Attempt>& attempt);
  std::vector<uint32_t> Prompt(int turn) const;
  v1::Sampling TurnSampling() const;
  // Whether some numeric family that is still possible draws this token here.
  bool IsExpected(uint64_t index, uint32_t token);
  // The answer to `prompt` after `log`, by family.
  std::vector<std::vector<uint32_t>> Undisturbed(std::vector<uint32_t> log, const std::vector<uint32_t>& prompt) const;
  std::string RequestId() const { return RequestIdOf(turn_); }
  static std::string RequestIdOf(int turn) { return absl::StrCat("turn-", turn); }

  Cluster* const cluster_;
  const int index_;
  const int turns_;
  const int tokens_;
  const std::string tenant_;
  std::string session_;                                   // As the store knows it.
  std::vector<uint32_t> base_;                            // What its log began with when it was cut or forked last.
  std::map<std::string, std::vector<uint32_t>> parents_;  // Sessions that it forked, and their logs by then.
  bool turns_back_ = false;                               // It has its session cut or forked just now.
  int turn_ = 0;
  bool gave_up_ = false;  // Some turn, which may still come.
  std::vector<uint32_t> received_;
  std::map<int, std::vector<uint32_t>> told_;    // Turns that ended, and what they answered.
  std::vector<std::vector<uint32_t>> expected_;  // By family; empty: ruled out.
  std::shared_ptr<Attempt> attempt_;
  absl::Time heard_at_;
  absl::Time told_at_;  // Something new, last; or it began to wait for something.
  bool held_ = false;
  std::vector<std::function<void()>> when_let_go_;
};

// What inputs here begin with.
std::vector<uint32_t> SharedBeginning(int count);
// T3, or N1 if the turn began with what was read before: token `index` is another than in an undisturbed run.
std::string NotUndisturbed(const std::weak_ptr<router::Turn>& turn, uint64_t index, const std::string& of);
// B2: what reaches a worker is within limits, whatever somebody sent.
absl::Status CheckCommand(const v1::ExecuteRequest& command);

// Somebody without a session: one call after the other, each until it is told whole.
class SimVisitor {
 public:
  SimVisitor(Cluster* cluster, int index, const std::string& tenant, int visits);
  void Start() { Next(absl::ZeroDuration()); }
  bool done() const { return visit_ == visits_; }
  const std::string& tenant() const { return tenant_; }
  uint64_t seed() const { return 5000 + index_; }

 private:
  class Stream;
  struct Attempt : SimCall {
    std::weak_ptr<router::Turn> turn;
  };

  void Next(absl::Duration pause);
  v1::GenerateRequest Good();
  // Bytes that are wrong somewhere, or everywhere; by chance they are not.
  std::string Strange();
  // `attempt` null: a strange one, of which nobody hears.
  void Call(const std::string& bytes, std::shared_ptr<Attempt> attempt);
  // As a router does it with what comes: not OK: refused.
  absl::Status Enter(const std::shared_ptr<Attempt>& attempt, const std::string& bytes, SimRouter& router);
  void Heard(const std::shared_ptr<Attempt>& attempt, const v1::GenerateResponse& message);
  void Closed(const std::shared_ptr<Attempt>& attempt, const absl::Status& status);
  void Watch(const std::shared_ptr<Attempt>& attempt);

  Cluster* const cluster_;
  const int index_;
  const int visits_;
  const std::string tenant_;
  int visit_ = 0;
  v1::GenerateRequest request_;
  std::vector<std::vector<uint32_t>> expected_;  // By family; empty: ruled out.
  uint64_t received_ = 0;
  std::shared_ptr<Attempt> attempt_;
  absl::Time heard_at_;
};

// Somebody who has inputs scored, embedded and looked at, and sessions exported and held: one call after the other,
// each until it is answered whole.
class SimCaller {
 public:
  SimCaller(Cluster* cluster, int index, const std::string& tenant, int calls);
  void Start() { Next(absl::ZeroDuration()); }
  bool done() const { return call_ == calls_; }

 private:
  enum class Kind { kScore, kDocument, kLogits, kMeanEmbedding, kLastEmbedding, kExport, kExclusive };
  template <typename Response>
  class Stream;
  using Attempt = SimCall;

  void Next(absl::Duration pause);
  void Call(const std::shared_ptr<Attempt>& attempt);
  // Of the call that `turn` is for, whose input it has.
  std::unique_ptr<router::CallKind> MakeKind(const std::shared_ptr<Attempt>& attempt, router::Turn* turn);
  // Some client's.
  void TakeSession(router::Turn* turn) const;
  // Hands on what a router says, unless it has died.
  void FromRouter(const Attempt& attempt, std::function<void()> message);
  // `asked`: how long the session's log was when it was called for.
  void CheckExport(const std::string& session_id, uint64_t asked, const v1::SnapshotManifest& manifest);
  std::vector<float> Undisturbed(int family) const;
  // The next value; false: no numeric family that is still possible says it.
  bool Take(float value);
  template <typename Values>
  void TakeAll(const std::shared_ptr<Attempt>& attempt, uint64_t first, const Values& values);
  void Heard(const std::shared_ptr<Attempt>& attempt, const v1::ScoreResponse& answer);
  void Heard(const std::shared_ptr<Attempt>& attempt, const v1::ScoreDocumentResponse& answer);
  void Heard(const std::shared_ptr<Attempt>& attempt, const v1::LogitsResponse& answer);
  void Heard(const std::shared_ptr<Attempt>& attempt, const v1::EmbedResponse& answer);
  void Heard(const std::shared_ptr<Attempt>& attempt, const router::ExportedState& answer);
  void Closed(const std::shared_ptr<Attempt>& attempt, const absl::Status& status);
  void Watch(const std::shared_ptr<Attempt>& attempt);
  std::string Name() const;

  Cluster* const cluster_;
  const int index_;
  const int calls_;
  const std::string tenant_;
  int call_ = 0;
  Kind kind_ = Kind::kScore;
  std::vector<uint32_t> input_;
  std::vector<std::vector<float>> expected_;  // By family; empty: ruled out.
  size_t expected_count_ = 0;
  size_t received_ = 0;
  std::shared_ptr<Attempt> attempt_;
  absl::Time heard_at_;
};

class Cluster {
 public:
  explicit Cluster(const Options& options);

  Result Run();

  uint64_t Draw() { return random_(); }
  bool Chance(double p) { return static_cast<double>(random_() >> 11) * 0x1p-53 < p; }
  absl::Duration Between(absl::Duration least, absl::Duration most);
  absl::Duration NetworkDelay() { return Between(absl::Microseconds(100), absl::Milliseconds(2)); }
  absl::Duration StoreDelay() { return Between(absl::Microseconds(500), absl::Milliseconds(6)); }
  // The first one counts.
  void Violated(const std::string& what);
  void CheckSnapshots();
  void CheckBounds(const SimRouter& router);
  // No fault of this run keeps a worker or a router from its work.
  bool lanes_are_sound() const { return lanes_are_sound_; }
  // Of an entry, now.
  bool LosesChunk() { return chunks_lost_ > 0 && Chance(0.3); }
  // Who draws with this seed. Unset: nobody who is known.
  absl::optional<std::string> TenantOf(uint64_t seed) const;
  // One that serves, if any does.
  int AnyRouter();
  // Ends the lanes that a worker is in.
  void LoseWorker(int worker, const std::string& why);

  const Options options;
  Timeline time;
  ModelStore store{&time};
  std::vector<SimWorker> workers;
  std::vector<std::unique_ptr<SimRouter>> routers;
  std::vector<std::unique_ptr<SimClient>> clients;
  std::vector<std::unique_ptr<SimVisitor>> visitors;
  std::vector<std::unique_ptr<SimCaller>> callers;
  std::map<std::string, absl::Time> announced;  // Routers, by name.
  router::TurnOptions turn_options;
  std::shared_ptr<const router::ServingModel> model;
  router::RouterMetrics* metrics;
  int stages = 1;
  int families = 1;
  int strangers = 0;  // Faults under way that send what is no request.
  uint64_t tokens = 0;
  absl::Duration longest_pause;                      // Of a client that waits for the next message of its turn.
  uint64_t reused_tokens = 0;                        // Of visitors.
  std::map<std::string, PrefixOwner> prefix_owners;  // By snapshot.
  router::CallId next_call = 1;
  SimRouter* caller = nullptr;  // Whose store job runs, and in which life of it.
  uint64_t caller_life = 0;

 private:
  void DrawFaults();
  void Inject(const Fault& fault);
  void Undo(const Fault& fault);
  // The next event, and the checks. False: all is done, or a law is broken.
  bool Step();
  // The call that is being made may wait, while all else goes on.
  void HoldCall();

  std::mt19937_64 random_;
  std::vector<Fault> faults_;
  std::string violation_;
  bool lanes_are_sound_ = true;
  int stores_away_ = 0;
  int answers_lost_ = 0;
  int chunks_lost_ = 0;
  bool holds_call_ = false;
  uint64_t checked_ = 0;  // Of the timeline's steps, when the snapshots were looked at last.
  absl::Time begin_;
};

}  // namespace rwkv::simulator
