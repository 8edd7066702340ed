// Which workers make which pipelines, and which of these a router should drive. Pure: told what is seen, says what to
// do; time is passed in.
//
// Workers that make one *kind* of pipeline hold the same model and states and compute in one numeric family. A *lane* is
// a pipeline that somebody drives. Those of one kind are shared out evenly: with L lanes (driven, or ready to be) and R
// routers each drives L/R of them, and the first L%R in an order that differs by kind one more. Nobody has to agree on
// that: a worker refuses a second driver, and who was refused looks again.
// - A router takes what it lacks of its share at once, and, after kOthersTurn, what others left lying.
// - It gives away what it has beyond its share when another has two less and nothing lies around. If that is not taken,
//   it takes it back and keeps it for a while that doubles.
// - Spares are workers that fit no further lane: they wait, and are in the next one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::router {

// What can be seen of one worker.
struct SeenWorker {
  std::string address;
  const v1::DescribeResponse* said = nullptr;  // Null: nothing yet. Not owned.
  bool answers = false;                        // Lately, and since it was last lost.
  uint64_t lane = 0;                           // Of this router; 0: none.
};

// A lane of this router, being opened or open.
struct OwnLane {
  uint64_t id = 0;
  std::string kind;
  int turns = 0;
  bool closing = false;
};

// Equal for workers that can be in one pipeline.
std::string PipelineKind(const v1::DescribeResponse& worker);

// Whether nobody else drives it, or may go on to.
bool IsFree(const v1::DescribeResponse& worker, absl::string_view router);

// Disjoint chains of `candidates` (indices of `workers`, all of one kind), each from the first layer to the last; as
// many as a greedy search finds, at most `limit`. Those named first are preferred.
std::vector<std::vector<int>> FindChains(const std::vector<SeenWorker>& workers, const std::vector<int>& candidates,
                                         int limit);

// Not thread-safe.
class Assembly {
 public:
  static constexpr absl::Duration kOthersTurn = absl::Seconds(1);
  static constexpr absl::Duration kBetweenGifts = absl::Seconds(2);
  static constexpr absl::Duration kFirstKeep = absl::Seconds(10);
  static constexpr absl::Duration kLongestKeep = absl::Minutes(5);

  explicit Assembly(std::string router) : router_(std::move(router)) {}

  struct Decision {
    std::vector<std::vector<int>> open;  // Chains of workers, by stage.
    std::vector<uint64_t> give_away;     // Lanes.
    bool wants_more = false;             // It has less than its share, and what is there makes no lane.
    // When something may change without a new sight of a worker.
    absl::Time look_again = absl::InfiniteFuture();
  };

  // `routers`: those that want lanes, in any order; this one is counted whether or not it is among them.
  Decision Decide(const std::vector<SeenWorker>& workers, const std::vector<OwnLane>& own,
                  const std::vector<std::string>& routers, absl::Time now);

 private:
  struct Kind {
    absl::Time lies_since = absl::InfiniteFuture();  // Something has been there to take that is beyond the share.
    absl::Time next_gift = absl::InfinitePast();
    absl::Duration keep = kFirstKeep;
  };

  const std::string router_;
  std::map<std::string, Kind> kinds_;
};

}  // namespace rwkv::router
