// Every call that needs the pipeline or a session's lease, from its arrival to its last message.
//
// One thread (event_loop.h) owns all that changes: turns, sessions, the scheduler. gRPC callbacks, the pipeline's
// readers and the executor's threads only post to it; what blocks (the state store) runs on the executor. After each
// batch of events the loop sweeps over the running turns: what a turn may do next follows from what it is, not from
// which event came last.
//
// Laws kept here: a token goes to a client only after its commit (T1); a request_id runs once, and a session has one
// turn at a time (T2); a lost epoch, a restarted store or a returning client changes no token (T3).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/clock.h"
#include "services/router/core/response_stream.h"
#include "services/router/core/router_metrics.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/turn_input.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/turn_trace.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/pipeline/found_workers.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/state_store/client/state_store_client.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

struct Turn;

// Thread-safe. No public method waits for anything, but Drain() and Stop(). Generate(), Score(), ScoreDocument() and
// Embed() tokenize a text that they are given, which takes its time: not for gRPC's threads.
class TurnManager {
 public:
  using Options = TurnOptions;
  using Counts = TurnCounts;
  using ExportedState = router::ExportedState;
  using LaneState = router::LaneState;

  // The models there are, by fingerprint.
  struct Models {
    std::map<std::string, std::shared_ptr<const ServingModel>> served;  // Some pipeline of this router has one, or had.
    std::map<std::string, std::shared_ptr<const ServingModel>> seen;    // Some worker holds it.
  };

  // All pointers are borrowed and outlive it. `tokenizers`: the first that fits the model is used. `random` draws seeds
  // and ids; called from any thread.
  TurnManager(const Options& options, Fleet::Options fleet_options, std::unique_ptr<WorkerSource> workers,
              state_store::CatalogClient* catalog, std::vector<const tokenizer::Tokenizer*> tokenizers,
              RouterMetrics* metrics, common::Clock* clock, std::function<uint64_t()> random);
  ~TurnManager();  // Stop().
  TurnManager(const TurnManager&) = delete;
  TurnManager& operator=(const TurnManager&) = delete;

  // Connects to the workers.
  void Start();

  // From now on new calls get kUnavailable; running turns may finish until a little before `deadline`, are then paused
  // (their clients can resume them at any router) and saved. Blocks until all is done, at most until `deadline`.
  void Drain(absl::Time deadline);

  // Ends every call with kUnavailable and all threads.
  void Stop();

  CallId NewCall() { return next_call_.fetch_add(1); }

  // Each ends in stream->Close() or one call of `done`, on any thread, maybe before the method returns.
  // `tenant`: whose call it is, for a fair share of slots and rows.
  // `trace`: null: it is not traced.
  void Generate(CallId call, const v1::GenerateRequest& request,
                std::shared_ptr<ResponseStream<v1::GenerateResponse>> stream, const std::string& tenant = "",
                std::shared_ptr<TurnTrace> trace = nullptr);
  void Score(CallId call, const v1::ScoreRequest& request, std::function<void(absl::StatusOr<v1::ScoreResponse>)> done,
             const std::string& tenant = "", std::shared_ptr<TurnTrace> trace = nullptr);
  void ScoreDocument(CallId call, const Document& document,
                     std::shared_ptr<ResponseStream<v1::ScoreDocumentResponse>> stream, const std::string& tenant = "",
                     std::shared_ptr<TurnTrace> trace = nullptr);
  void Logits(CallId call, const v1::LogitsRequest& request, std::shared_ptr<ResponseStream<v1::LogitsResponse>> stream,
              const std::string& tenant = "", std::shared_ptr<TurnTrace> trace = nullptr);
  void Embed(CallId call, const v1::EmbedRequest& request, std::function<void(absl::StatusOr<v1::EmbedResponse>)> done,
             const std::string& tenant = "", std::shared_ptr<TurnTrace> trace = nullptr);
  // Makes sure that there is a snapshot at the end of the session's log.
  void Export(CallId call, const std::string& session_id, std::function<void(absl::StatusOr<ExportedState>)> done,
              std::shared_ptr<TurnTrace> trace = nullptr);
  // Runs `job` on the executor while no turn of the session runs and this router holds its lease; afterwards the
  // session's warm slots are gone. kAborted: a turn is running. `deletes`: when it is done the session is no more.
  void Exclusive(CallId call, const std::string& session_id, bool deletes, ExclusiveJob job,
                 std::function<void(absl::Status)> done, std::shared_ptr<TurnTrace> trace = nullptr);

  // The client is gone, or its deadline has passed. The stream or `done` is not called any more, or for the last time.
  void Cancel(CallId call);

  // Of the last pipeline that came up; null before the first.
  std::shared_ptr<const ServingModel> model() const;
  Models models() const;
  // The model that a request means by `name`, or by naming none, or why there is none. What requests are checked
  // against. kUnavailable: no pipeline of this router has it. kInvalidArgument: several have, and none is named.
  absl::StatusOr<std::shared_ptr<const ServingModel>> ModelOrWhyNot(absl::string_view name = "") const;

  const InputLimits& limits() const;
  Fleet& fleet();
  // The pipelines that this router drives; none if nobody answers until `deadline`.
  std::vector<LaneState> Lanes(absl::Time deadline);
  Counts counts() const;
  bool draining() const;
  // Whether the thread that owns all turns came round within the last ten seconds.
  bool MakesProgress() const;

 private:
  class Driver;

  // Sets model and initial state of a call without a session, as its request names them.
  absl::Status ChooseModel(absl::string_view model, absl::string_view initial_state, Turn* turn) const;
  // The same, and its input: one of both, or neither, which is an error.
  template <typename Request>
  absl::Status TakeInput(const Request& request, const std::string* text, const v1::TokenList* tokens,
                         Turn* turn) const;
  template <typename Request>
  absl::Status TakeTextOrTokens(const Request& request, Turn* turn) const;
  // Hands in a turn that feeds its prompt from a fresh state, unless the model does not take so many tokens.
  void SubmitFed(std::shared_ptr<Turn> turn);

  std::atomic<CallId> next_call_{1};
  const std::unique_ptr<Driver> driver_;
};

}  // namespace rwkv::router
