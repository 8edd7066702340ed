// Weighted fair queueing of tokens between flows (tenants): who is served next where not all can be. Pure.
//
// Each flow has a counter, tokens served / weight, and the one with the smallest is next. A flow that has had nothing to
// do is lifted to the smallest counter of those that have when it comes back: being idle earns no credit, and starting
// anew costs none (virtual token counter, arXiv:2401.00588 section 4). So over any time in which two flows always have
// work, the tokens they get differ from their weights' ratio by no more than one grant each.
#pragma once

#include <cstddef>
#include <string>

#include "absl/container/btree_map.h"
#include "absl/strings/string_view.h"

namespace rwkv::router {

// Not thread-safe. The same calls give the same answers.
class FairShare {
 public:
  // One more, one fewer piece of work of the flow is there. Calls come in pairs. `weight` > 0, from now on.
  void Begin(absl::string_view flow, double weight);
  void End(absl::string_view flow);

  // The flow was served; it has work.
  void Charge(absl::string_view flow, double tokens);

  // Smaller: served earlier.
  double counter(absl::string_view flow) const;

  size_t flows() const { return flows_.size(); }  // That are remembered.

 private:
  struct Flow {
    double weight = 1;
    double counter = 0;
    int work = 0;
  };
  double Smallest() const;
  void ForgetIdle();

  absl::btree_map<std::string, Flow> flows_;
  double floor_ = 0;  // No flow that comes back begins below it.
};

}  // namespace rwkv::router
