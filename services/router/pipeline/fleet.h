// The router's hold on its workers: looks for them, asks each again and again who it is, makes pipelines of those that
// fit (assembly.h), drives each through a lane (lane.h), and puts them together anew when one breaks.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/pipeline/assembly.h"
#include "services/router/pipeline/found_workers.h"
#include "services/router/pipeline/lane.h"
#include "services/router/pipeline/lane_load.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::router {

// Thread-safe.
class Fleet {
 public:
  // Another router is there for so long after a worker was told of it last.
  static constexpr absl::Duration kRouterRemembered = absl::Seconds(2);

  struct Options {
    Lane::Options lane;
    absl::Duration find_interval = absl::Seconds(1);        // Between two looks at where workers are.
    absl::Duration ask_interval = absl::Milliseconds(500);  // Between two questions to one of them.
    absl::Duration ask_timeout = absl::Seconds(1);          // Of one question.
    absl::Duration worker_timeout = absl::Seconds(5);       // A lane with a worker that answers nothing so long ends.
    absl::Duration min_backoff = absl::Milliseconds(20);    // Between questions while a pipeline is wanted.
    absl::Duration max_backoff = absl::Seconds(1);
    absl::Duration closing_timeout = absl::Seconds(5);      // For the turns of a lane that closes to leave it.
    std::function<void(v1::RouterAnnouncement*)> announce;  // Adds what is said of this router besides its name.
  };

  // A model that some known worker holds, whether or not a lane serves it.
  struct SeenModel {
    v1::ModelInfo model;
    std::string numeric_family;
    std::vector<v1::StateTensor> state_layout;
  };

  // Also hears which lanes close, given away or with a worker that drains: nothing new should begin there, and EndEpoch
  // be called once nothing runs there any more; and of all models that are seen, when these change.
  class Listener : public LaneListener {
   public:
    virtual void OnEpochClosing(uint64_t epoch) {}
    virtual void OnModelsSeen(const std::vector<SeenModel>& models) {}
  };

  struct State {
    bool serving = false;                 // A lane is up.
    absl::Status status;                  // Why not.
    std::string text;                     // "serving", or "connecting: ..." or "standing by: ..." as status shows it.
    absl::optional<v1::ModelInfo> model;  // Of the last epoch; unset before the first.
  };

  struct WorkerStatus {
    std::string address;
    absl::Status status;          // Of the question just asked.
    v1::DescribeResponse worker;  // The last answer; default if there was none.
    int stage_index = -1;         // In the last lane of this router that it was in; -1: in none.
    int stage_count = 0;
    uint64_t epoch = 0;  // Of the lane of this router that it is in; 0: none.
  };

  // `listener` outlives it. Nothing happens before Start().
  Fleet(Options options, std::unique_ptr<WorkerSource> source, Listener* listener);
  ~Fleet();  // Stop().
  Fleet(const Fleet&) = delete;
  Fleet& operator=(const Fleet&) = delete;

  void Start() ABSL_LOCKS_EXCLUDED(mu_);
  // Ends all epochs and waits for all threads; the listener hears OnEpochDown if it heard OnEpochUp.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  // As Lane::Send() and Lane::End() of the epoch's lane; false if there is none.
  bool Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) ABSL_LOCKS_EXCLUDED(mu_);
  void EndEpoch(uint64_t epoch, absl::Status why) ABSL_LOCKS_EXCLUDED(mu_);
  // What a lane has to do: the one with the fewest turns is given away first, and other routers are told.
  void SetLoad(uint64_t epoch, const LaneLoad& load) ABSL_LOCKS_EXCLUDED(mu_);

  // Whether another router drives workers of this model and numeric family (FINGERPRINT/FAMILY).
  bool OthersDrive(absl::string_view pool) const ABSL_LOCKS_EXCLUDED(mu_);

  State state() const ABSL_LOCKS_EXCLUDED(mu_);

  // Asks every worker, in parallel, who it is. Blocks until `deadline` at most. By address.
  std::vector<WorkerStatus> Probe(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

  // Other routers that workers were told of lately, by name.
  std::vector<v1::RouterAnnouncement> OtherRouters() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Worker {
    std::string address;
    std::shared_ptr<worker::WorkerClient> client;
    bool listed = true;
    int asking = 0;        // Questions on their way; it stays as long.
    bool answers = false;  // Since it was last lost.
    absl::Time next_ask = absl::InfinitePast();
    absl::Duration backoff;
    absl::Time silent_since;  // The first question that was not answered since it was last heard.
    absl::Status status;
    bool described = false;
    v1::DescribeResponse said;
    uint64_t lane = 0;
    int stage_index = -1;
    int stage_count = 0;
  };
  struct OpenLane {
    std::unique_ptr<Lane> lane;
    std::string kind;
    absl::Time begin;
    LaneLoad load;
    bool noticed_up = false;
    absl::Time close_by = absl::InfiniteFuture();
    std::string closes_why;
  };

  void Find() ABSL_LOCKS_EXCLUDED(mu_);
  void Run() ABSL_LOCKS_EXCLUDED(mu_);
  // What follows runs on Run()'s thread.
  void TakeList() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<std::unique_ptr<Lane>> TakeEndedLanes(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndSilentLanes(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Lanes of which a worker drains: their turns are to leave before it goes.
  void CloseDraining(absl::Time now, std::vector<uint64_t>* closing) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The lanes to start and those that begin to close.
  void Decide(absl::Time now, std::vector<Lane*>* starting, std::vector<uint64_t>* closing)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status OpenChain(const std::vector<SeenWorker>& seen, const std::vector<int>& chain, absl::Time now,
                         std::vector<Lane*>* starting) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  State WhyNoLane() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // By fingerprint and family.
  std::map<std::string, SeenModel> ModelsSeen() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // With the look at it that found it to be asked: neither it nor the fleet goes before Ask()'s answer.
  void BeginAsking(Worker& worker) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Ask(const std::shared_ptr<Worker>& worker, absl::Time deadline,
           std::function<void(const absl::StatusOr<v1::DescribeResponse>&)> also) ABSL_LOCKS_EXCLUDED(mu_);
  void Answered(Worker& worker, const absl::StatusOr<v1::DescribeResponse>& answer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Wake() ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  const std::unique_ptr<WorkerSource> source_;
  Listener* const listener_;  // Not owned.

  mutable absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  int asking_ ABSL_GUARDED_BY(mu_) = 0;  // Questions on their way.
  bool listed_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::string> list_ ABSL_GUARDED_BY(mu_);
  bool list_changed_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status list_status_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, std::shared_ptr<Worker>> workers_ ABSL_GUARDED_BY(mu_);  // By address.
  std::map<uint64_t, OpenLane> lanes_ ABSL_GUARDED_BY(mu_);                      // By epoch.
  uint64_t last_epoch_ ABSL_GUARDED_BY(mu_) = 0;
  bool wants_more_ ABSL_GUARDED_BY(mu_) = true;
  absl::Time look_again_ ABSL_GUARDED_BY(mu_);
  Assembly assembly_ ABSL_GUARDED_BY(mu_);
  State why_not_ ABSL_GUARDED_BY(mu_);                    // What state() says while no lane is up, and the last model.
  std::vector<std::string> models_ ABSL_GUARDED_BY(mu_);  // Keys of ModelsSeen() as told last.
  std::map<std::string, std::pair<v1::RouterAnnouncement, absl::Time>> routers_ ABSL_GUARDED_BY(mu_);

  std::thread finder_;  // Find().
  std::thread thread_;  // Run().
};

}  // namespace rwkv::router
