// Which worker is which stage, derived from what the workers say of themselves.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::router {

struct StagePlan {
  struct Stage {
    std::string address;
    v1::DescribeResponse worker;
    int worker_index = 0;  // In the list that the plan was made from.
  };
  v1::ModelInfo model;        // With the smallest max_context_tokens that a stage has.
  std::vector<Stage> stages;  // By layers, ascending.
  int slots = 0;              // Of the stage that has the fewest.
  int max_batch_rows = 0;     // Of the stage that takes the fewest.
  std::vector<v1::StateTensor> state_layout;
};

// `workers`: address and description of each, in any order; not empty.
// kFailedPrecondition: they do not make one pipeline: two models, two state layouts, two lists of tuned states, two
// numeric families, a description that makes no sense. kUnavailable: one drains, or layers overlap or are missing, for
// which a worker may be on its way. Messages name the workers and what they hold.
absl::StatusOr<StagePlan> MakeStagePlan(const std::vector<std::pair<std::string, v1::DescribeResponse>>& workers);

}  // namespace rwkv::router
