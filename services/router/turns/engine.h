// The inside of the turn manager: what the event loop's thread owns and does.
//   engine.cc            calls: arrival, admission, joining, ends; drain
//   engine_sweep.cc      what is done after each batch of events
//   engine_messages.cc   what goes to clients
//   engine_log.cc        leases, turns in the log, group commit
//   engine_saves.cc      snapshots, yielding
//   engine_lanes.cc      lanes come and go; which of them a turn runs on
//   engine_pipeline.cc   giving a turn its slot
//   engine_steps.cc      feeding, results
//   engine_kinds.cc      what each kind of call does next
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/clock.h"
#include "services/common/executor.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/pipeline/found_workers.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/router/scheduler/scheduler.h"
#include "services/router/turns/event_loop.h"
#include "services/router/turns/router_metrics.h"
#include "services/router/turns/serving_model.h"
#include "services/router/turns/turn.h"
#include "services/router/turns/turn_lane.h"
#include "services/router/turns/turn_manager.h"
#include "services/router/turns/turn_opening.h"
#include "services/state_store/client/state_store_client.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

// Snapshots on their way at a time, as a multiple of the slots: beyond it running turns are not saved in between.
inline constexpr size_t kSavesPerSlot = 2;

class TurnManager::Engine final : public Fleet::Listener {
 public:
  using TurnPtr = std::shared_ptr<Turn>;

  Engine(const Options& options, Fleet::Options fleet_options, std::unique_ptr<WorkerSource> workers,
         state_store::CatalogClient* catalog, std::vector<const tokenizer::Tokenizer*> tokenizers,
         RouterMetrics* metrics, common::Clock* clock, std::function<uint64_t()> random);
  ~Engine() override;

  // Any thread.
  const Options& options() const { return options_; }
  Fleet& fleet() { return fleet_; }
  RouterMetrics& metrics() { return *metrics_; }
  uint64_t Random() { return random_(); }
  absl::Time Now() { return clock_->Now(); }
  void Start() { fleet_.Start(); }
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);
  void Drain(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  void Submit(TurnPtr turn);
  void Cancel(CallId call);
  // Of the last epoch that came up; null before the first.
  std::shared_ptr<const ServingModel> model() const ABSL_LOCKS_EXCLUDED(mu_);
  TurnManager::Models models() const ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<TurnManager::LaneState> Lanes(absl::Time deadline);
  Counts counts() const { return {running_count_.load(), waiting_count_.load(), tokens_per_second_.load()}; }
  bool draining() const { return draining_.load(); }
  absl::Time last_round() const { return loop_->last_round(); }
  absl::Status DrainingStatus() const;
  // Tells the caller of a turn that never started. On any thread: nobody else has such a turn.
  void Reject(Turn& turn, const absl::Status& status);

  // Fleet::Listener; the fleet's threads.
  void OnEpochUp(uint64_t epoch, const StagePlan& plan) override ABSL_LOCKS_EXCLUDED(mu_);
  void OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) override;
  void OnEpochDown(uint64_t epoch, const absl::Status& why) override;
  void OnEpochClosing(uint64_t epoch) override;
  void OnModelsSeen(const std::vector<Fleet::SeenModel>& models) override ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // What other routers are told of this one, too.
  Fleet::Options WithAnnouncement(Fleet::Options options);

  // Everything below: the loop's thread.

  // --- engine.cc
  void Arrive(const TurnPtr& turn);
  void Join(const TurnPtr& live, Turn& call);
  // Whether the session of a call that waits lets it start, and whether there is room for it while `active` turns have
  // a part of the slots.
  bool SessionFree(const Turn& turn) const;
  bool Fits(const Turn& turn, const PoolUse& active) const;
  bool CanStart(const Turn& turn) const { return Fits(turn, ActiveByPool()) && SessionFree(turn); }
  void StartWaiting();
  void StartTurn(const TurnPtr& turn);
  // The call ends for its client; the turn may go on closing.
  void EndCall(Turn& turn, const absl::Status& status);
  // On any thread that has the turn for itself.
  void CloseStreams(Turn& turn, const absl::Status& status);
  // Nothing more is generated, and the log keeps the turn open.
  void Abandon(Turn& turn);
  void Fail(Turn& turn, const absl::Status& status);
  // It cannot go on, now or ever: that is its end, in the log too.
  void Refuse(Turn& turn, const absl::Status& status);
  Session& SessionOf(const std::string& id);
  // Runs `work` on the executor, then `then` with its result on the loop. False: the executor's queue is full.
  template <typename Result>
  bool RunJob(common::Executor& executor, std::function<Result()> work, std::function<void(Result)> then);

  // --- engine_sweep.cc
  void Sweep();
  void SweepTurn(Turn& turn);
  bool CommitClean(const Turn& turn) const;
  void SweepWaiting();
  void SweepYields();
  // A turn whose answer can pause.
  static bool CanYield(const Turn& turn);
  void BeginYield(Turn& turn);
  void SweepDrain();
  void Watch();
  void UpdateGauges();

  // --- engine_messages.cc
  void ObserveCall(const Turn& turn);  // One that ended well.
  void Pump(Turn& turn);
  // Whether `limit` messages are in the turn's stream; then the loop hears when there are fewer. Fails the turn of a
  // client that takes nothing for too long.
  bool IsFull(Turn& turn, size_t limit);
  // Whether the client of Logits or ScoreDocument takes more, with `queued` messages in its stream. Fails the turn of
  // one that takes nothing for too long.
  bool HasRoom(Turn& turn, size_t queued);
  v1::GenerateResponse FinishMessage(const Turn& turn) const;
  void SendScores(Turn& turn);

  // --- engine_log.cc
  void OpenTurn(const TurnPtr& turn);
  void OnOpened(const TurnPtr& turn, const Opened& opened);
  void ChooseModelOf(const Session& session, Turn& turn);
  absl::Status TakeUp(Turn& turn, const Opened& opened);
  void RunExclusive(const TurnPtr& turn);
  struct CommitResult {
    uint64_t turn_id = 0;
    size_t tokens = 0;
    bool finish = false;
    absl::Status status;
  };
  void SweepCommits();
  // On the committer's thread.
  std::vector<absl::Status> Commit(const v1::AppendTokensRequest& request, const std::vector<uint64_t>& turn_tokens);
  absl::StatusOr<bool> WasAppended(const v1::AppendItem& item, uint64_t turn_tokens, absl::Time deadline);
  void OnCommitted(const std::vector<CommitResult>& results, absl::Duration took);
  void SweepSessions();
  void SweepLeases();
  absl::Status StoreError(const absl::Status& status) const;
  // Who leaves does not wait for a store that is away.
  absl::Time StoreDeadline() const {
    return absl::Now() + (draining() ? std::min(options_.store_timeout, absl::Seconds(2)) : options_.store_timeout);
  }

  // --- engine_saves.cc
  bool Save(Turn& turn);
  void SaveAndRetire(Turn& turn);
  // Gives the slot to others; the turn goes to the end of the line.
  void Yield(const TurnPtr& turn);
  // The state that a turn without a session left behind is not needed any more.
  void DropOwn(Turn& turn);
  void OnSaved(const v1::SnapshotSaved& saved);
  void SweepSaves();
  static v1::SnapshotManifest ManifestOf(const PendingSave& save);
  void OnManifest(const std::string& snapshot_id, const absl::Status& status);
  void EndSave(const std::string& snapshot_id, const absl::Status& status);

  // --- engine_lanes.cc
  void EpochUp(uint64_t epoch, const StagePlan& plan);
  void EpochDown(uint64_t epoch, const absl::Status& why);
  // A turn that lost its slot with the lane is parked, or at its end.
  void Unseat(Turn& turn, const absl::Status& why);
  void CountSlots();
  // Forgets pools that have no lane and of which no worker is seen.
  void DropPools() ABSL_LOCKS_EXCLUDED(mu_);
  PoolUse ActiveByPool() const;
  // The pool with the most slots to spare that the turn may run in, if any has one.
  const Pool* ChoosePool(const Turn& turn, const PoolUse& active) const;
  bool KnowsModel(const Turn& turn) const;
  // Whether what is served now is what the turn began with, or is about to begin with.
  absl::Status CheckServed(const Turn& turn) const;
  absl::Status CheckLane(const Turn& turn, const TurnLane& lane) const;
  // Whether the turn may be attached there now.
  bool IsOpenTo(const Turn& turn, const TurnLane& lane) const;
  bool HasLane(const Turn& turn) const;
  // Where the turn waits least; null: nowhere.
  TurnLane* ChooseLane(const Turn& turn) const;
  void DropWarm(absl::string_view session_id);
  int TotalSlots() const;
  void SweepClosing();

  // --- engine_pipeline.cc
  void Handle(uint64_t epoch, int stage, const v1::ExecuteResponse& response);
  struct Located {
    absl::Status status;
    v1::SnapshotManifest manifest;
    std::vector<uint32_t> tail;
  };
  void Park(Turn& turn);
  void Locate(const TurnPtr& turn);
  // Takes a warm slot at a position in [at_least, at_most], if there is one.
  bool LocateWarm(const TurnPtr& turn, uint64_t at_least, uint64_t at_most);
  // The slot of a turn that yielded is warm under these two names.
  static std::string WarmSession(const Turn& turn);
  static std::string WarmBranch(const Turn& turn);
  void OnLocated(const TurnPtr& turn, Located located);
  void Admit(const TurnPtr& turn, uint64_t position);
  void BeginAttach(const TurnPtr& turn, TurnLane& lane, SequenceId sequence, uint64_t position);
  void OnAttachAnswer(const v1::SequenceAttached& attached);
  void OnAttachFailed(Turn& turn, const absl::Status& status);
  void RemoveSequence(Turn& turn);

  // --- engine_steps.cc
  void FeedKnown(Turn& turn);
  void OnStep(TurnLane& lane, const v1::StepResult& result);
  void OnEntry(Turn& turn, const v1::EntryResult& result);
  void OnEntryFailed(Turn& turn, const absl::Status& status);
  void OnLogits(const v1::LogitsRows& rows);
  void SendCommands(TurnLane& lane);
  void FillStep(const StepCommand& command, v1::Step* step);
  void FillAttach(const AttachCommand& command, v1::AttachSequence* attach);

  // --- engine_kinds.cc
  // What a running sequence does next; `idle`: all that it was fed has come back, as for those without it.
  void Advance(Turn& turn);
  void AdvanceGenerate(Turn& turn, bool idle);
  void AdvanceScore(Turn& turn);
  void AdvanceDocument(Turn& turn);
  void AdvanceLogits(Turn& turn);
  void AdvanceEmbed(Turn& turn);
  void AdvanceExport(Turn& turn);
  bool Lagging(const Turn& turn) const;

  const Options options_;
  state_store::CatalogClient* const catalog_;  // Not owned, as the next four.
  const std::vector<const tokenizer::Tokenizer*> tokenizers_;
  RouterMetrics* const metrics_;
  common::Clock* const clock_;
  const std::function<uint64_t()> random_;

  mutable absl::Mutex mu_;
  std::shared_ptr<const ServingModel> model_ ABSL_GUARDED_BY(mu_);
  TurnManager::Models models_ ABSL_GUARDED_BY(mu_);
  bool idle_ ABSL_GUARDED_BY(mu_) = false;  // Drained.
  std::atomic<bool> draining_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<int> running_count_{0};
  std::atomic<int> waiting_count_{0};
  std::atomic<double> tokens_per_second_{0};
  std::atomic<bool> serving_{false};

  // The loop's thread.
  uint64_t next_turn_ = 1;
  std::deque<TurnPtr> waiting_;  // The line: calls that wait to be started, and turns that gave their slot away.
  size_t yielded_ = 0;           // Of these, and of running_.
  std::map<uint64_t, TurnPtr> running_;  // By Turn::id, from its start to its last message.
  absl::flat_hash_map<CallId, TurnPtr> by_call_;
  std::map<std::string, Session> sessions_;
  bool commit_running_ = false;
  bool renew_running_ = false;
  absl::Time next_renewal_;
  uint64_t tokens_drawn_ = 0;
  uint64_t tokens_counted_ = 0;  // Of these, in tokens_per_second_ when it was set last.
  absl::Time counted_at_;
  absl::Time pause_at_ = absl::InfiniteFuture();  // Draining: who still runs then is paused.

  std::map<uint64_t, std::unique_ptr<TurnLane>> lanes_;  // By epoch.
  std::map<std::string, Pool> pools_;
  std::vector<std::string> seen_pools_;
  absl::flat_hash_map<SequenceId, TurnPtr> by_sequence_;
  SequenceId next_sequence_ = 1;
  std::map<std::string, PendingSave> saves_;

  // Destroyed in reverse: the loop last of all that may post to it.
  std::unique_ptr<EventLoop> loop_;
  Fleet fleet_;
  common::Executor committer_;  // One commit at a time.
  common::Executor executor_;
};

template <typename Result>
bool TurnManager::Engine::RunJob(common::Executor& executor, std::function<Result()> work,
                                 std::function<void(Result)> then) {
  return executor.TryRun([this, work = std::move(work), then = std::move(then)] {
    auto result = std::make_shared<Result>(work());
    loop_->Post([then, result] { then(std::move(*result)); });
  });
}

}  // namespace rwkv::router
