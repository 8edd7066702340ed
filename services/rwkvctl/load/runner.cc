#include "services/rwkvctl/load/runner.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "services/rwkvctl/load/conversations.h"

namespace rwkv::rwkvctl {

// Threads take turns at being the one that waits for the next request to be due; it sends that one itself, and another
// takes its place, a new one if need be.
class LoadRunner::Impl {
 public:
  Impl(LoadOptions options, router::RouterClient* client, LoadClock* clock,
       std::function<void(const LoadProgress&)> on_progress)
      : options_(std::move(options)),
        client_(*client),
        clock_(*clock),
        on_progress_(std::move(on_progress)),
        workload_(options_.workload),
        conversations_(options_.workload.trace.has_value() ? options_.workload.trace->conversations
                                                           : options_.sessions),
        report_(options_.limits, options_.measured) {}

  LoadReport Run() ABSL_LOCKS_EXCLUDED(mutex_) {
    begin_ = clock_.Now();
    {
      absl::MutexLock lock(&mutex_);
      // A closed loop needs all of them at once; an open one begins with one, and each that sends calls the next.
      const bool is_open = options_.workload.arrivals.has_value() || options_.workload.trace.has_value();
      for (int i = 0; i < (is_open ? 1 : options_.max_in_flight); ++i) StartThread();
    }
    for (int64_t tick = 1;; ++tick) {
      LoadProgress progress;
      {
        absl::MutexLock lock(&mutex_);
        const auto over = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return working_ == 0; };
        if (clock_.AwaitUntil(mutex_, absl::Condition(&over), begin_ + tick * options_.progress_interval)) break;
        progress = Progress();
      }
      on_progress_(progress);
    }
    for (std::thread& thread : threads_) thread.join();
    DeleteSessions();
    absl::MutexLock lock(&mutex_);
    return report_;
  }

  void Stop() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    for (router::Cancellation* call : calls_) call->Cancel();
  }

 private:
  // Of one request, beside what it measures.
  struct Turn {
    PlannedRequest plan;
    absl::Duration due;  // By the clock, as the next.
    absl::Duration deadline;
    uint64_t number = 0;                  // In the line for a trace's conversation.
    absl::optional<size_t> conversation;  // Once it has it for itself.
    std::string session_id;
  };

  void StartThread() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ++working_;
    ++idle_;
    threads_.emplace_back([this] { Work(); });
  }

  void Work() ABSL_LOCKS_EXCLUDED(mutex_) {
    Turn turn;
    while (TakeNext(turn)) {
      RequestOutcome outcome;
      outcome.due = turn.due - begin_;
      outcome.sent = absl::InfiniteDuration();
      router::Cancellation call;
      {
        absl::MutexLock lock(&mutex_);
        calls_.insert(&call);
        if (stopped_) call.Cancel();
      }
      if (NeedsConversation(turn)) outcome.status = TakeConversation(turn);
      if (outcome.status.ok()) outcome.status = Send(turn, call, outcome);
      outcome.ended = clock_.Now() - begin_;
      End(turn, call, outcome);
    }
    absl::MutexLock lock(&mutex_);
    --idle_;
    --working_;
  }

  // Waits until the next request is due. False: there is none, or not any more.
  bool TakeNext(Turn& turn) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    const auto free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !waiting_for_due_; };
    mutex_.Await(absl::Condition(&free));
    if (over_ || stopped_) return false;
    absl::optional<PlannedRequest> plan = workload_.Next();
    const absl::Duration now = clock_.Now();
    // In a closed loop the end comes by the clock.
    const bool is_late = plan.has_value() && !plan->due.has_value() && options_.workload.duration.has_value() &&
                         now - begin_ >= *options_.workload.duration;
    if (!plan.has_value() || is_late) {
      over_ = true;
      return false;
    }
    turn = Turn();
    turn.plan = *plan;
    turn.due = plan->due.has_value() ? begin_ + *plan->due : now;
    turn.deadline = turn.due + options_.deadline;
    if (plan->due.has_value()) {
      waiting_for_due_ = true;
      clock_.AwaitUntil(mutex_, absl::Condition(&stopped_), turn.due);
      waiting_for_due_ = false;
      if (stopped_) return false;
    }
    ++sent_;
    --idle_;
    if (plan->conversation.has_value()) turn.number = conversations_.Enqueue(*plan->conversation);
    if (idle_ == 0 && working_ < options_.max_in_flight) StartThread();
    return true;
  }

  bool NeedsConversation(const Turn& turn) const {
    return turn.plan.conversation.has_value() || (options_.sessions > 0 && !options_.workload.trace.has_value());
  }

  // Waits until the turn has its conversation for itself.
  absl::Status TakeConversation(Turn& turn) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    const bool is_named = turn.plan.conversation.has_value();
    const auto is_there = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return stopped_ ||
             (is_named ? conversations_.IsCalled(*turn.plan.conversation, turn.number) : conversations_.HasIdle());
    };
    if (!clock_.AwaitUntil(mutex_, absl::Condition(&is_there), turn.deadline)) {
      return absl::DeadlineExceededError("its conversation was busy until the deadline");
    }
    if (stopped_) return absl::CancelledError("stopped before it was sent");
    turn.conversation = is_named ? *turn.plan.conversation : conversations_.TakeIdle();
    Conversations::Conversation& conversation = conversations_.at(*turn.conversation);
    ++conversation.turns;
    turn.session_id = conversation.session_id;
    return absl::OkStatus();
  }

  // Sends the turn, again where a refusal says when and the load is to do so.
  absl::Status Send(Turn& turn, router::Cancellation& call, RequestOutcome& outcome) ABSL_LOCKS_EXCLUDED(mutex_) {
    v1::GenerateRequest request;
    request.set_model(options_.model);
    const std::vector<uint32_t> prompt =
        RandomPrompt(options_.workload.seed, turn.plan.index, turn.plan.prompt_tokens, options_.vocab_size);
    request.mutable_tokens()->mutable_ids()->Add(prompt.begin(), prompt.end());
    request.set_max_tokens(turn.plan.max_tokens);
    request.set_ignore_end_of_text(true);
    *request.mutable_sampling() = options_.sampling;
    outcome.tokens.reserve(turn.plan.max_tokens);
    for (;;) {
      const absl::Duration now = clock_.Now();
      if (now >= turn.deadline) return absl::DeadlineExceededError("it was not sent before its deadline");
      outcome.sent = std::min(outcome.sent, now - begin_);
      const absl::Status status = SendOnce(turn, request, call, outcome);
      const absl::optional<absl::Duration> delay = common::GetRetryDelay(status);
      if (status.ok() || !delay.has_value()) return status;
      outcome.refused_after.push_back(clock_.Now() - now);
      ++refusals_;
      const absl::Duration again = clock_.Now() + *delay;
      if (!options_.retry || !outcome.tokens.empty() || again >= turn.deadline) return status;
      absl::MutexLock lock(&mutex_);
      if (clock_.AwaitUntil(mutex_, absl::Condition(&stopped_), again)) return absl::CancelledError("stopped");
    }
  }

  absl::Status SendOnce(Turn& turn, v1::GenerateRequest& request, router::Cancellation& call, RequestOutcome& outcome)
      ABSL_LOCKS_EXCLUDED(mutex_) {
    if (turn.conversation.has_value() && turn.session_id.empty()) {
      absl::StatusOr<v1::Session> session = client_.CreateSession(v1::SessionsCreateRequest());
      if (!session.ok()) return session.status();
      turn.session_id = session->id();
      absl::MutexLock lock(&mutex_);
      conversations_.at(*turn.conversation).session_id = turn.session_id;
    }
    request.set_session_id(turn.session_id);
    // With a name the turn survives a lost connection.
    if (!turn.session_id.empty()) request.set_request_id(absl::StrCat("load-", turn.plan.index));
    return client_.Generate(
        request,
        [&](const v1::GenerateResponse& response) {
          if (response.has_finish()) {
            outcome.prompt_tokens = response.finish().prompt_tokens();
            outcome.reused_tokens = response.finish().reused_tokens();
          } else {
            outcome.tokens.push_back(clock_.Now() - begin_);
            ++tokens_;
          }
          return absl::OkStatus();
        },
        &call, absl::Now() + (turn.deadline - clock_.Now()));
  }

  void End(const Turn& turn, router::Cancellation& call, RequestOutcome& outcome) ABSL_LOCKS_EXCLUDED(mutex_) {
    std::string to_delete;
    {
      absl::MutexLock lock(&mutex_);
      calls_.erase(&call);
      outcome.interrupted = stopped_ && absl::IsCancelled(outcome.status);
      report_.Add(outcome);
      ++(outcome.status.ok() ? completed_ : failed_);
      if (turn.conversation.has_value() && !turn.plan.conversation.has_value()) {
        Conversations::Conversation& conversation = conversations_.at(*turn.conversation);
        // After a failure nobody knows what the session holds.
        if (conversation.turns >= options_.turns || !outcome.status.ok()) {
          to_delete = std::exchange(conversation.session_id, "");
          conversation.turns = 0;
        }
      }
    }
    if (!to_delete.empty()) DeleteSession(to_delete);
    absl::MutexLock lock(&mutex_);
    if (turn.plan.conversation.has_value()) {
      conversations_.End(*turn.plan.conversation, turn.number);
    } else if (turn.conversation.has_value()) {
      conversations_.GiveBack(*turn.conversation);
    }
    ++idle_;
  }

  void DeleteSession(const std::string& id) ABSL_LOCKS_EXCLUDED(mutex_) {
    if (options_.keep_sessions) return;
    v1::SessionsDeleteRequest request;
    request.set_session_id(id);
    // One that stays is no matter: it is idle. A cluster that is gone should not keep us for each of them.
    const absl::Status status = client_.DeleteSession(request);
    absl::MutexLock lock(&mutex_);
    deleting_ = deleting_ && (status.ok() || absl::IsNotFound(status));
  }

  void DeleteSessions() ABSL_LOCKS_EXCLUDED(mutex_) {
    for (size_t c = 0;; ++c) {
      std::string id;
      {
        absl::MutexLock lock(&mutex_);
        if (c == conversations_.size() || !deleting_) return;
        id = conversations_.at(c).session_id;
      }
      if (!id.empty()) DeleteSession(id);
    }
  }

  LoadProgress Progress() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    LoadProgress progress;
    progress.elapsed = clock_.Now() - begin_;
    progress.sent = sent_;
    progress.completed = completed_;
    progress.failed = failed_;
    progress.refusals = refusals_;
    progress.generated_tokens = tokens_;
    progress.ttft_p50 = report_.ttft.Quantile(0.5);
    return progress;
  }

  const LoadOptions options_;
  router::RouterClient& client_;
  LoadClock& clock_;
  const std::function<void(const LoadProgress&)> on_progress_;
  absl::Duration begin_;              // Set before any thread starts.
  std::vector<std::thread> threads_;  // Grows under mutex_ until all have ended.

  absl::Mutex mutex_;
  Workload workload_ ABSL_GUARDED_BY(mutex_);
  Conversations conversations_ ABSL_GUARDED_BY(mutex_);
  LoadReport report_ ABSL_GUARDED_BY(mutex_);
  std::set<router::Cancellation*> calls_ ABSL_GUARDED_BY(mutex_);
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  bool over_ ABSL_GUARDED_BY(mutex_) = false;             // No request is left.
  bool waiting_for_due_ ABSL_GUARDED_BY(mutex_) = false;  // Somebody has taken the next request.
  bool deleting_ ABSL_GUARDED_BY(mutex_) = true;          // False once a session could not be deleted.
  int working_ ABSL_GUARDED_BY(mutex_) = 0;               // Threads that have not ended,
  int idle_ ABSL_GUARDED_BY(mutex_) = 0;                  // and those of them without a request.
  uint64_t sent_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t completed_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t failed_ ABSL_GUARDED_BY(mutex_) = 0;  // Interrupted ones, too.

  std::atomic<uint64_t> tokens_ = 0;
  std::atomic<uint64_t> refusals_ = 0;
};

LoadRunner::LoadRunner(LoadOptions options, router::RouterClient* client, LoadClock* clock,
                       std::function<void(const LoadProgress&)> on_progress)
    : impl_(std::make_unique<Impl>(std::move(options), client, clock, std::move(on_progress))) {}

LoadRunner::~LoadRunner() = default;

LoadReport LoadRunner::Run() { return impl_->Run(); }

void LoadRunner::Stop() { impl_->Stop(); }

}  // namespace rwkv::rwkvctl
