// Conversations that stream while a test kills, stops and restarts things; in the end each has said, token by token,
// what it says undisturbed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "services/router/client/router_client.h"
#include "tests/testing/local_cluster.h"

namespace rwkv::testing {

// What lets a client outlast all that a test does.
router::RouterClientOptions Patience();

// A client of all routers that begins with `first` and is patient.
std::unique_ptr<router::RouterClient> PatientClient(const LocalCluster& cluster, int first = 0);

// Use it from one thread; if a LocalCluster is given, from that of the cluster.
class Conversations {
 public:
  struct Options {
    int count = 6;
    int stories = 2;  // Conversation I tells story I % stories.
    int tokens_per_turn = 300;
    int turns_per_session = 0;  // Then a conversation goes on in a session of its own anew; 0: it has one session.
    int shared_tokens = 0;      // Every session's first input begins with these.
    // Of a whole turn, with every pause that faults cause; and of ExpectProgress().
    absl::Duration limit = absl::Seconds(60);
  };
  using Tokens = std::vector<uint32_t>;

  // The model must have kVocabulary tokens at least. `cluster` outlives it.
  static constexpr uint32_t kVocabulary = 101;
  Conversations(LocalCluster* cluster, const Options& options)
      : Conversations([cluster](int number) { return PatientClient(*cluster, std::max(number, 0)); }, options) {}
  // The client of each conversation, and of the stories (kTeller).
  static constexpr int kTeller = -1;
  using MakeClient = std::function<std::unique_ptr<router::RouterClient>(int number)>;
  Conversations(MakeClient make_client, const Options& options)
      : options_(options), make_client_(std::move(make_client)) {}
  ~Conversations();

  // Begins; the test has failed if it cannot.
  void Start();
  // Each conversation ends a turn that was not ended at the call; else the test fails.
  void ExpectProgress();
  // Fails the test if a conversation has ended by an error; true if none has.
  bool NoneFailed();
  // Ends the conversations, each after its turn.
  void Stop();
  // Stop(); then tells each story once more, undisturbed: every turn of every conversation must be the same. The
  // cluster has to be whole and serving.
  void Compare();

  int turns() const;
  // Of the conversations' inputs, what was not read again but began with a state that was there.
  uint64_t reused_tokens() const { return reused_tokens_; }
  // The longest time between two tokens of a turn, or before its first: what clients saw of the faults.
  absl::Duration longest_pause() const ABSL_LOCKS_EXCLUDED(mu_);
  // Whose it was, and when.
  std::string longest_pause_of() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Conversation {
    std::string name;
    int story = 0;
    std::unique_ptr<router::RouterClient> client;
    std::thread thread;
    std::vector<Tokens> turns;
    absl::Status status;
    std::atomic<int> done{0};
    std::atomic<bool> failed{false};
  };

  // Told undisturbed.
  struct Story {
    size_t length = 0;  // In turns.
    std::vector<Tokens> turns;
    absl::Status status;
  };

  void Run(Conversation& conversation);
  void Tell(int number, Story& story);
  // One turn, however often it takes to be let in, in the session of `name` that it belongs to.
  absl::StatusOr<Tokens> Turn(router::RouterClient& client, const std::string& name, int story, int number,
                              uint64_t* reused_tokens);
  absl::Status CreateSession(router::RouterClient& client, const std::string& id) const;
  // A stream stood still from `begin` to `end`; `calls`: how often it was begun or resumed meanwhile, `why`: why the
  // last of those before ended.
  void NotePause(absl::Time begin, absl::Time end, const std::string& of, int calls, const absl::Status& why)
      ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  const MakeClient make_client_;
  std::atomic<bool> stop_{false};
  mutable absl::Mutex mu_;
  absl::Duration longest_pause_ ABSL_GUARDED_BY(mu_);
  std::string longest_pause_of_ ABSL_GUARDED_BY(mu_);
  std::atomic<uint64_t> reused_tokens_{0};
  std::vector<std::unique_ptr<Conversation>> conversations_;
};

}  // namespace rwkv::testing
