// A router's surroundings inside a test: a pipeline with a made-up model, a state store in memory, and as many routers
// after each other as the test wants.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/router/core/response_stream.h"
#include "services/router/core/router_metrics.h"
#include "services/router/driver/turn_manager.h"
#include "services/state_store/client/fake_state_store.h"
#include "services/tokenizer/tokenizer.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::router {

// How long any wait of a test may last.
inline constexpr absl::Duration kTestLimit = absl::Seconds(60);

// kTestLimit until a wait has lasted so long; from then on little, so that a test that is broken says so and ends.
absl::Duration WaitLimit();
// Remembers that one has. Returns `came`.
bool Waited(bool came);

// Waits until `condition` holds, looking often. False: it does not within the limit.
bool WaitUntil(const std::function<bool()>& condition);

// Remembers what a call sends. Takes everything at once, or, while held, nothing.
template <typename Response>
class FakeStream final : public ResponseStream<Response> {
 public:
  void Send(Response response) override ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    received_.push_back(std::move(response));
  }
  size_t queued() const override ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return held_ ? received_.size() - held_at_ : 0;
  }
  void OnRoom(std::function<void()> on_room) override ABSL_LOCKS_EXCLUDED(mu_) {
    {
      absl::MutexLock lock(&mu_);
      if (held_) {
        on_room_ = std::move(on_room);
        return;
      }
    }
    on_room();
  }
  void Close(absl::Status status) override ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    EXPECT_FALSE(closed_) << "closed twice";
    closed_ = true;
    status_ = std::move(status);
  }

  // The client stops reading, or goes on.
  void Hold() ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    held_ = true;
    held_at_ = received_.size();
  }
  void LetGo() ABSL_LOCKS_EXCLUDED(mu_) {
    std::function<void()> on_room;
    {
      absl::MutexLock lock(&mu_);
      held_ = false;
      on_room.swap(on_room_);
    }
    if (on_room) on_room();
  }

  absl::Status Wait() ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    if (!Waited(mu_.AwaitWithTimeout(absl::Condition(&closed_), WaitLimit()))) {
      return absl::DeadlineExceededError("the call did not end");
    }
    return status_;
  }
  bool WaitReceived(size_t count) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, count]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return received_.size() >= count; };
    return Waited(mu_.AwaitWithTimeout(absl::Condition(&enough), WaitLimit()));
  }
  bool closed() const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return closed_;
  }
  std::vector<Response> received() const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return received_;
  }

 private:
  mutable absl::Mutex mu_;
  std::vector<Response> received_ ABSL_GUARDED_BY(mu_);
  bool held_ ABSL_GUARDED_BY(mu_) = false;
  size_t held_at_ ABSL_GUARDED_BY(mu_) = 0;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  std::function<void()> on_room_ ABSL_GUARDED_BY(mu_);
};

using GenerateStream = FakeStream<v1::GenerateResponse>;

// Every id of a 65,536 row embedding is a short lower-case word; id 0 ends the text.
class FakeTokenizer final : public tokenizer::Tokenizer {
 public:
  FakeTokenizer();
  absl::string_view name() const override { return "world"; }
  std::vector<uint32_t> Encode(absl::string_view bytes) const override;       // Byte b is id b + 1; "<end>" is id 0.
  std::vector<uint32_t> EncodePlain(absl::string_view bytes) const override;  // The same without "<end>".
  absl::string_view TokenBytes(uint32_t id) const override;
  uint32_t vocab_size() const override { return 65536; }
  uint32_t end_of_text() const override { return 0; }

 private:
  std::vector<std::string> words_;
};

class FakeCluster {
 public:
  // One call and what came of it.
  struct Call {
    CallId id = 0;
    std::shared_ptr<GenerateStream> stream = std::make_shared<GenerateStream>();
  };
  struct Answer {
    absl::Status status;
    std::vector<uint32_t> tokens;
    uint64_t first_index = 0;
    std::string text;
    v1::Finish finish;
  };

  // `clock`: of router and store, outlives the cluster; null: the system's. `others`: pipelines beside the first; each
  // needs a name of its own.
  explicit FakeCluster(worker::FakePipeline::Options pipeline = {}, TurnManager::Options router = {},
                       common::Clock* clock = nullptr, std::vector<worker::FakePipeline::Options> others = {});
  ~FakeCluster();

  // The router dies and another one starts: same name, same store, nothing else in common. Calls of the old one end.
  void RestartRouter();
  void StopRouter();
  // Waits until calls are taken: the router's core has heard of a pipeline's newest epoch.
  bool WaitServing();

  // Another router beside it, over the same workers and the same store.
  std::unique_ptr<TurnManager> MakeRouter(TurnManager::Options options);

  Call Start(const v1::GenerateRequest& request) { return Start(*router_, request); }
  static Call Start(TurnManager& router, const v1::GenerateRequest& request);
  // Waits for its end. Checks that indices are consecutive.
  Answer Finish(const Call& call);
  Answer Generate(const v1::GenerateRequest& request) { return Finish(Start(request)); }

  void CreateSession(const std::string& id, const std::string& initial_state = "");
  std::vector<uint32_t> Log(const std::string& session_id);

  TurnManager& router() { return *router_; }
  worker::FakePipeline& pipeline(size_t i = 0) { return *pipelines_[i]; }
  state_store::FakeStateStore& store() { return *store_; }
  // All that workers have put so far.
  std::vector<v1::RecordInfo> PutRecords() ABSL_LOCKS_EXCLUDED(put_mu_);
  RouterMetrics& metrics() { return *router_metrics_; }
  // The value of a counter or gauge by its name and one label (empty: none), as it is exported; -1: there is none.
  double Exported(const std::string& name, const std::string& label = "", const std::string& value = "");
  TurnManager::Options& router_options() { return router_options_; }
  const FakeTokenizer& tokenizer() const { return tokenizer_; }

 private:
  common::SystemClock system_clock_;
  common::Clock* const clock_;
  FakeTokenizer tokenizer_;
  std::unique_ptr<common::Metrics> metrics_;
  std::unique_ptr<RouterMetrics> router_metrics_;
  std::unique_ptr<state_store::FakeStateStore> store_;
  absl::Mutex put_mu_;
  std::vector<v1::RecordInfo> put_records_ ABSL_GUARDED_BY(put_mu_);
  std::vector<worker::FakePipeline::Options> pipeline_options_;
  std::vector<std::unique_ptr<worker::FakePipeline>> pipelines_;
  TurnManager::Options router_options_;
  int incarnation_ = 0;
  std::string epoch_prefix_;  // Of router_'s epochs' names, before their numbers.
  std::unique_ptr<TurnManager> router_;
};

// A request for `count` greedy tokens after `tokens`.
v1::GenerateRequest Request(absl::Span<const uint32_t> tokens, uint32_t count);
v1::GenerateRequest SessionRequest(const std::string& session_id, const std::string& request_id,
                                   absl::Span<const uint32_t> tokens, uint32_t count);

}  // namespace rwkv::router
