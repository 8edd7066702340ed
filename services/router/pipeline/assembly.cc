#include "services/router/pipeline/assembly.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace rwkv::router {
namespace {

// The same on every router, unlike std::hash or absl::Hash.
uint64_t Fnv(absl::string_view a, absl::string_view b) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const absl::string_view text : {a, absl::string_view("\0", 1), b}) {
    for (const unsigned char byte : text) hash = (hash ^ byte) * 0x100000001b3;
  }
  return hash ^ (hash >> 29);
}

bool MakesSense(const v1::DescribeResponse& worker) {
  return worker.model().layer_count() >= 1 && worker.first_layer() >= 0 && worker.end_layer() > worker.first_layer() &&
         worker.end_layer() <= worker.model().layer_count();
}

// Free workers by first layer, then by end, the longest share first; the preferred ones at the back.
using Shares = std::map<int, std::map<int, std::vector<int>, std::greater<>>>;

bool Extend(int layer, int layer_count, Shares& shares, std::set<int>& dead_ends, std::vector<int>& chain) {
  if (layer == layer_count) return true;
  if (dead_ends.count(layer) > 0) return false;
  const auto from = shares.find(layer);
  if (from != shares.end()) {
    for (auto& [end, workers] : from->second) {
      if (workers.empty()) continue;
      chain.push_back(workers.back());
      if (Extend(end, layer_count, shares, dead_ends, chain)) {
        workers.pop_back();
        return true;
      }
      chain.pop_back();
    }
  }
  dead_ends.insert(layer);
  return false;
}

// How many of `lanes` the router of this name should drive.
int ShareOf(const std::string& router, const std::vector<std::string>& routers, int lanes, const std::string& kind) {
  const int count = static_cast<int>(routers.size());
  int rank = 0;
  const uint64_t own = Fnv(kind, router);
  for (const std::string& other : routers) {
    const uint64_t theirs = Fnv(kind, other);
    rank += theirs < own || (theirs == own && other < router);
  }
  return lanes / count + (rank < lanes % count);
}

}  // namespace

std::string PipelineKind(const v1::DescribeResponse& worker) {
  std::string kind =
      absl::StrCat(worker.model().fingerprint(), "/", worker.model().layer_count(), "/", worker.numeric_family());
  for (const std::string& state : worker.model().initial_states()) absl::StrAppend(&kind, "/", state);
  for (const v1::StateTensor& tensor : worker.state_layout()) {
    absl::StrAppend(&kind, "/", tensor.name());
    for (const int64_t size : tensor.shape()) absl::StrAppend(&kind, ",", size);
  }
  return kind;
}

bool IsFree(const v1::DescribeResponse& worker, absl::string_view router) {
  return worker.driven_by().empty() || worker.driven_by() == router || worker.driver_is_silent();
}

std::vector<std::vector<int>> FindChains(const std::vector<SeenWorker>& workers, const std::vector<int>& candidates,
                                         int limit) {
  std::vector<std::vector<int>> chains;
  if (candidates.empty()) return chains;
  Shares shares;
  for (auto it = candidates.rbegin(); it != candidates.rend(); ++it) {
    const v1::DescribeResponse& worker = *workers[*it].said;
    shares[worker.first_layer()][worker.end_layer()].push_back(*it);
  }
  const int layer_count = workers[candidates.front()].said->model().layer_count();
  while (static_cast<int>(chains.size()) < limit) {
    std::set<int> dead_ends;
    std::vector<int> chain;
    if (!Extend(0, layer_count, shares, dead_ends, chain)) break;
    chains.push_back(std::move(chain));
  }
  return chains;
}

Assembly::Decision Assembly::Decide(const std::vector<SeenWorker>& workers, const std::vector<OwnLane>& own,
                                    const std::vector<std::string>& wanting, absl::Time now) {
  std::set<std::string> names(wanting.begin(), wanting.end());
  names.insert(router_);
  const std::vector<std::string> routers(names.begin(), names.end());

  std::map<std::string, std::vector<int>> free;                                // By kind.
  std::map<std::string, std::map<std::string, std::set<std::string>>> driven;  // Kind, router: epochs.
  for (int i = 0; i < static_cast<int>(workers.size()); ++i) {
    if (workers[i].said == nullptr || workers[i].lane != 0 || !MakesSense(*workers[i].said)) continue;
    const v1::DescribeResponse& said = *workers[i].said;
    const std::string kind = PipelineKind(said);
    if (!IsFree(said, router_)) {
      if (workers[i].answers) driven[kind][said.driven_by()].insert(said.epoch());
    } else if (workers[i].answers && !said.draining()) {
      free[kind].push_back(i);
    }
  }
  std::set<std::string> seen;
  for (const auto& [kind, indices] : free) seen.insert(kind);
  for (const OwnLane& lane : own) seen.insert(lane.kind);

  Decision decision;
  for (const std::string& name : seen) {
    Kind& kind = kinds_[name];
    std::vector<int>& candidates = free[name];
    // Each router begins elsewhere, so that those that look at the same time seldom want the same.
    std::sort(candidates.begin(), candidates.end(), [&](int a, int b) {
      return std::make_pair(Fnv(router_, workers[a].address), a) < std::make_pair(Fnv(router_, workers[b].address), b);
    });
    std::vector<std::vector<int>> chains = FindChains(workers, candidates, static_cast<int>(candidates.size()));
    const int ready = static_cast<int>(chains.size());
    int mine = 0;
    for (const OwnLane& lane : own) mine += lane.kind == name && !lane.closing;
    int lanes = mine + ready;
    for (const auto& [router, epochs] : driven[name]) lanes += static_cast<int>(epochs.size());
    const int share = ShareOf(router_, routers, lanes, name);

    int take = std::min(ready, std::max(0, share - mine));
    if (ready <= take) {
      kind.lies_since = absl::InfiniteFuture();
    } else if (kind.lies_since == absl::InfiniteFuture()) {
      kind.lies_since = now;
    }
    if (now - kind.lies_since >= kOthersTurn) {
      take = ready;
      kind.lies_since = absl::InfiniteFuture();
      kind.next_gift = now + kind.keep;
      kind.keep = std::min(2 * kind.keep, kLongestKeep);
    } else if (kind.lies_since != absl::InfiniteFuture()) {
      decision.look_again = std::min(decision.look_again, kind.lies_since + kOthersTurn);
    }
    for (int i = 0; i < take; ++i) decision.open.push_back(std::move(chains[i]));
    decision.wants_more |= mine + take < std::max(share, 1);

    if (ready > 0 || mine <= share || now < kind.next_gift) continue;
    const bool is_lacking = std::any_of(routers.begin(), routers.end(), [&](const std::string& router) {
      const int theirs = router == router_ ? mine : static_cast<int>(driven[name][router].size());
      return theirs + 1 < mine && theirs < ShareOf(router, routers, lanes, name);
    });
    if (!is_lacking) continue;
    const OwnLane* gift = nullptr;
    for (const OwnLane& lane : own) {
      if (lane.kind == name && !lane.closing && (gift == nullptr || lane.turns < gift->turns)) gift = &lane;
    }
    decision.give_away.push_back(gift->id);
    kind.next_gift = now + kBetweenGifts;
  }
  return decision;
}

}  // namespace rwkv::router
