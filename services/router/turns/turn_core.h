// What the router decides: events go in by method calls, everything else goes out through World. No threads, no clock
// and no randomness of its own: equal events and equal answers of the world give equal calls to it.
//   turn_core.cc            calls: arrival, admission, joining, ends; drain
//   turn_core_sweep.cc      what is done after each batch of events
//   turn_core_messages.cc   what goes to clients
//   turn_core_log.cc        turns in the log: how they are opened, committed, lost
//   turn_core_saves.cc      snapshots of turns
//   turn_core_yields.cc     slots that turns give away to others
//   turn_core_lanes.cc      lanes come and go
//   turn_core_pipeline.cc   giving a turn its slot
//   turn_core_steps.cc      feeding, results
//   turn_core_go_on.cc      sequences that decode without being asked for each token
//   turn_core_advance.cc    what a running sequence does next
// What can be told apart has its own type: session_table (leases held), log_writer (group commit), placement (lanes,
// and which of them a turn runs on), saves (snapshots on their way), prefixes (states of beginnings that inputs share),
// ../scheduler (what runs in a lane's next steps), turn_opening, patience, fair_slots.
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

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/router/scheduler/fair_slots.h"
#include "services/router/scheduler/kept_slots.h"
#include "services/router/scheduler/scheduler.h"
#include "services/router/turns/log_writer.h"
#include "services/router/turns/placement.h"
#include "services/router/turns/prefixes.h"
#include "services/router/turns/router_metrics.h"
#include "services/router/turns/saves.h"
#include "services/router/turns/session_table.h"
#include "services/router/turns/turn.h"
#include "services/router/turns/turn_lane.h"
#include "services/router/turns/turn_opening.h"
#include "services/router/turns/turn_options.h"
#include "services/router/turns/world.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

// Snapshots on their way at a time, as a multiple of the slots: beyond it running turns are not saved in between.
inline constexpr size_t kSavesPerSlot = 2;

// So long a turn waits for the state that it left behind, and an export or a change of a session for one that is on its
// way. Then it goes on without: what is not there is read again.
inline constexpr absl::Duration kSaveWait = absl::Seconds(5);

class TurnCore {
 public:
  using TurnPtr = std::shared_ptr<Turn>;
  using Options = TurnOptions;

  // All borrowed.
  TurnCore(const Options& options, World* world, state_store::CatalogClient* catalog, RouterMetrics* metrics);

  // Any thread.
  const Options& options() const { return options_; }
  TurnCounts counts() const { return {running_count_.load(), waiting_count_.load(), tokens_per_second_.load()}; }
  bool draining() const { return draining_.load(); }
  bool serving() const { return serving_.load(); }
  absl::Status DrainingStatus() const;
  // From now on DrainingStatus() is why; what is begun is brought to its end by BeginDrain() or Stop().
  void SetDraining() { draining_ = true; }
  void SetStopping() { stopping_ = draining_ = true; }
  // Tells the caller of a turn that never started. On any thread: nobody else has such a turn.
  void Reject(Turn& turn, const absl::Status& status);

  // Events, and all that follows: one thread at a time. After each event, or a few, Sweep() does what follows.
  void Arrive(const TurnPtr& turn);
  void Cancel(CallId call);
  void EpochUp(uint64_t epoch, const StagePlan& plan);
  void EpochDown(uint64_t epoch, const absl::Status& why);
  void EpochClosing(uint64_t epoch);
  void PoolsSeen(const std::vector<std::string>& pools);
  void Handle(uint64_t epoch, int stage, const v1::ExecuteResponse& response);
  // Who still runs at `pause_at` is paused.
  void BeginDrain(absl::Time pause_at);
  // Every call ends.
  void Stop();
  void Sweep();
  std::vector<LaneState> Lanes() const;
  // Whether a model's fingerprint is of a pool that is there or may come back.
  bool KnowsModel(const std::string& fingerprint) const { return placement_.KnowsModel(fingerprint); }

 private:
  absl::Time Now() const { return world_->Now(); }

  // --- turn_core.cc
  void Join(const TurnPtr& live, Turn& call);
  // Whether the session of a call that waits lets it start, and whether there is room for it while `active` turns have
  // a part of the slots.
  bool SessionFree(const Turn& turn) const;
  bool Fits(const Turn& turn, const PoolUse& active) const;
  // As many as may run.
  bool RunsMost() const;
  bool CanStart(const Turn& turn) const { return Fits(turn, ActiveByPool()) && SessionFree(turn); }
  void StartWaiting();
  // A full line makes room for a tenant that has less of it than another, at the cost of that one's last.
  bool MakeRoom(const Turn& turn);
  double WeightOf(absl::string_view tenant) const;
  // Slots that turns have a right to, by tenant; of one pool, or with an empty name of all.
  std::map<std::string, int> HeldByTenant(const std::string& pool) const;
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

  // --- turn_core_sweep.cc
  void SweepTurn(Turn& turn);
  // Where the turn stands, for its trace.
  static void TraceStage(Turn& turn);
  bool CommitClean(const Turn& turn) const;
  void SweepParked(Turn& turn);
  void SweepWaiting();
  void SweepDrain();
  void Watch();
  void UpdateGauges();

  // --- turn_core_messages.cc
  void ObserveCall(const Turn& turn);  // One that ended well.
  void Pump(Turn& turn);
  // Whether `limit` messages are in the turn's stream; then the loop hears when there are fewer. Fails the turn of a
  // client that takes nothing for too long.
  bool IsFull(Turn& turn, size_t limit);
  // As CallKind::HasRoom.
  bool HasRoom(Turn& turn, size_t queued);
  v1::GenerateResponse FinishMessage(const Turn& turn) const;

  // --- turn_core_log.cc
  void OpenTurn(const TurnPtr& turn);
  void OnOpened(const TurnPtr& turn, const Opened& opened);
  void ChooseModelOf(const Session& session, Turn& turn);
  absl::Status TakeUp(Turn& turn, const Opened& opened);
  void RunExclusive(const TurnPtr& turn);
  void SweepCommits();
  void OnCommitted(const std::vector<LogWriter::Item>& items, absl::Duration took);
  // Another router has it; what is not in the log is not this one's to write any more.
  void OnLeaseLost(Session& session);
  absl::Status StoreError(const absl::Status& status) const;
  // Who leaves does not wait for a store that is away.
  absl::Time StoreDeadline() const {
    return world_->CallClock() +
           (draining() ? std::min(options_.store_timeout, absl::Seconds(2)) : options_.store_timeout);
  }

  // --- turn_core_saves.cc
  // A snapshot on the way would not be one too many.
  bool MaySave(const Turn& turn) const;
  void SavePrefix(Turn& turn);
  // As Saves::Ended.
  void OnSaveEnded(const PendingSave& save, bool is_whole, const absl::Status& status);
  // The state that a turn without a session left behind is not needed any more.
  void DropOwn(Turn& turn);
  void SaveAndRetire(Turn& turn);

  // --- turn_core_yields.cc
  // What a pool has for those that wait.
  struct PoolDemand {
    std::vector<FairHolder> holders;  // Who could give a slot away.
    int coming = 0;                   // Slots that come free without anybody else giving one away.
    std::vector<std::string> line;    // The tenants of those that want one, the longest waiting first.
  };
  void SweepYields();
  // Of pools in which anybody could give a slot away.
  std::map<std::string, PoolDemand> DemandByPool() const;
  // Who is to give its slot away; `most` states may be saved.
  std::vector<uint64_t> ChooseYields(const std::string& pool, const PoolDemand& demand, int most) const;
  // A turn whose answer can pause.
  static bool CanYield(const Turn& turn);
  void BeginYield(Turn& turn);
  // Gives the slot to others; the turn goes to the end of the line.
  void Yield(const TurnPtr& turn);
  // More turns than slots are left where lanes were lost. Those without one are the first in the line, in their order,
  // so that others yield to them, and whatever lane comes up has them.
  bool HasNoPlace(const Turn& turn) const;
  void WaitForPlace(const TurnPtr& turn);
  // The turn is over and has left its slot, which waits for the tenant's next one if others would take it, and the
  // tenant has no more than its share.
  void KeepSlot(const Turn& turn);

  // --- turn_core_lanes.cc
  // A turn that lost its slot with the lane is parked, or at its end.
  void Unseat(Turn& turn, const absl::Status& why);
  // Turns that have a part of the slots.
  PoolUse ActiveByPool() const;
  void SweepClosing();

  // --- turn_core_pipeline.cc
  void Park(Turn& turn);
  void Locate(const TurnPtr& turn);
  // Takes a warm slot at a position in [at_least, at_most], if there is one.
  bool LocateWarm(const TurnPtr& turn, uint64_t at_least, uint64_t at_most);
  // The slot of a turn that yielded is warm under these two names.
  static std::string WarmSession(const Turn& turn);
  static std::string WarmBranch(const Turn& turn);
  // Of a turn that has nothing else to begin from.
  void LocatePrefix(const TurnPtr& turn, v1::FindPrefixRequest find);
  void OnLocated(const TurnPtr& turn, Located located);
  void Admit(const TurnPtr& turn, uint64_t position);
  void BeginAttach(const TurnPtr& turn, TurnLane& lane, SequenceId sequence, uint64_t position);
  void OnAttachAnswer(const v1::SequenceAttached& attached);
  void OnAttachFailed(Turn& turn, const absl::Status& status);
  // Of its session. An older one is taken, or none.
  void OnSnapshotUnusable(Turn& turn, const absl::Status& why);
  // It needs no slot any more.
  void RemoveSequence(Turn& turn);
  // Its slot is another's, or nobody's, from now on.
  void LeaveSlot(Turn& turn);

  // --- turn_core_steps.cc
  void FeedKnown(Turn& turn);
  void OnStep(TurnLane& lane, const v1::StepResult& result);
  void OnEntry(Turn& turn, const v1::EntryResult& result);
  void OnToken(Turn& turn, const v1::EntryResult& result);
  void OnEntryFailed(Turn& turn, const absl::Status& status);
  void OnLogits(const v1::LogitsRows& rows);
  void SendCommands(TurnLane& lane);
  void FillStep(const StepCommand& command, v1::Step* step);
  void FillAttach(const AttachCommand& command, v1::AttachSequence* attach);

  // --- turn_core_go_on.cc
  // Whether its worker may feed what it draws by itself, and up to which position, the commands so far included.
  bool MayGoOn(const Turn& turn) const;
  uint64_t GoOnLimit(const Turn& turn) const;
  // With the entry that draws its first token here.
  void BeginGoingOn(Turn& turn, v1::StepEntry* entry);
  void AdvanceGoing(Turn& turn, bool idle);
  // A token came that may have ended the answer: whether its worker has seen that, too.
  void FollowStop(Turn& turn, uint32_t token_id);
  // It stops within two steps, and OnStopped() follows.
  void Halt(Turn& turn);
  void OnStopped(const v1::SequenceStopped& stopped);
  // All its results are there.
  void SettleStop(Turn& turn);
  // The worker goes no further than what has come back.
  void StandStill(Turn& turn);

  // --- turn_core_advance.cc
  void Advance(Turn& turn);
  void Feed(Turn& turn, uint64_t end, Scheduler::FeedKind kind);
  // `idle`: all that it was fed has come back.
  void AdvanceGenerate(Turn& turn, bool idle);
  // Saves the state of a prefix if it is there, and feeds what comes behind. False: there is nothing of that to wait
  // for.
  bool FeedPastPrefix(Turn& turn);
  bool Lagging(const Turn& turn) const;

  const Options options_;
  World* const world_;
  state_store::CatalogClient* const catalog_;
  RouterMetrics* const metrics_;

  std::atomic<bool> draining_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<int> running_count_{0};
  std::atomic<int> waiting_count_{0};
  std::atomic<double> tokens_per_second_{0};
  std::atomic<bool> serving_{false};

  uint64_t next_turn_ = 1;
  std::deque<TurnPtr> waiting_;  // The line: calls that wait to be started, and turns that gave their slot away.
  size_t yielded_ = 0;           // Of these, and of running_.
  std::map<uint64_t, TurnPtr> running_;  // By Turn::id, from its start to its last message.
  std::map<CallId, TurnPtr> by_call_;
  SessionTable sessions_;
  LogWriter log_writer_;
  uint64_t tokens_drawn_ = 0;
  uint64_t tokens_counted_ = 0;  // Of these, in tokens_per_second_ when it was set last.
  absl::Time counted_at_;
  absl::Time pause_at_ = absl::InfiniteFuture();  // Draining: who still runs then is paused.

  Placement placement_;
  Prefixes prefixes_;
  Saves saves_;
  KeptSlots kept_;
  std::map<SequenceId, TurnPtr> by_sequence_;
  SequenceId next_sequence_ = 1;
};

}  // namespace rwkv::router
