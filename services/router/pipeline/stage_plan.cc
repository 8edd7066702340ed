#include "services/router/pipeline/stage_plan.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"

namespace rwkv::router {
namespace {

std::string Layers(const StagePlan::Stage& stage) {
  return absl::StrCat(stage.address, " (layers ", stage.worker.first_layer(), ":", stage.worker.end_layer(), ")");
}

std::string Kernels(const StagePlan::Stage& stage) {
  return absl::StrCat(stage.address, " (kernels ", stage.worker.kernels(), ", numeric family ",
                      stage.worker.numeric_family(), ")");
}

absl::Status CheckWorker(const StagePlan::Stage& stage) {
  const v1::DescribeResponse& worker = stage.worker;
  if (worker.draining()) return absl::UnavailableError(absl::StrCat("worker ", stage.address, " drains"));
  if (worker.model().fingerprint().empty() || worker.model().layer_count() < 1 || worker.model().vocab_size() < 1) {
    return absl::FailedPreconditionError(absl::StrCat("worker ", stage.address, " does not say which model it holds"));
  }
  if (worker.first_layer() < 0 || worker.end_layer() <= worker.first_layer() ||
      worker.end_layer() > worker.model().layer_count()) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", Layers(stage), " does not fit a model of ", worker.model().layer_count(), " layers"));
  }
  if (worker.slots() < 1 || worker.max_batch_tokens() < 1) {
    return absl::FailedPreconditionError(absl::StrCat("worker ", stage.address, " has ", worker.slots(),
                                                      " slots and takes ", worker.max_batch_tokens(),
                                                      " tokens a step; both must be positive"));
  }
  return absl::OkStatus();
}

std::string InitialStates(const v1::DescribeResponse& worker) {
  const auto& ids = worker.model().initial_states();
  return ids.empty() ? "none" : absl::StrJoin(ids, ", ");
}

std::string Layout(const v1::DescribeResponse& worker) {
  std::string text;
  for (const v1::StateTensor& tensor : worker.state_layout()) {
    absl::StrAppend(&text, text.empty() ? "" : ", ", tensor.name(), "[");
    for (int i = 0; i < tensor.shape_size(); ++i) absl::StrAppend(&text, i == 0 ? "" : ",", tensor.shape(i));
    absl::StrAppend(&text, "]");
  }
  return text;
}

}  // namespace

absl::StatusOr<StagePlan> MakeStagePlan(const std::vector<std::pair<std::string, v1::DescribeResponse>>& workers) {
  if (workers.empty()) return absl::FailedPreconditionError("no workers");
  StagePlan plan;
  for (int i = 0; i < workers.size(); ++i) plan.stages.push_back({workers[i].first, workers[i].second, i});
  for (const StagePlan::Stage& stage : plan.stages) RWKV_RETURN_IF_ERROR(CheckWorker(stage));

  std::stable_sort(plan.stages.begin(), plan.stages.end(), [](const StagePlan::Stage& a, const StagePlan::Stage& b) {
    return a.worker.first_layer() < b.worker.first_layer();
  });
  const StagePlan::Stage& first = plan.stages.front();
  plan.model = first.worker.model();
  plan.slots = first.worker.slots();
  plan.max_batch_rows = first.worker.max_batch_tokens();
  plan.state_layout.assign(first.worker.state_layout().begin(), first.worker.state_layout().end());
  for (const StagePlan::Stage& stage : plan.stages) {
    const v1::ModelInfo& model = stage.worker.model();
    if (model.fingerprint() != plan.model.fingerprint()) {
      return absl::FailedPreconditionError(
          absl::StrCat("two different models in one pipeline: worker ", first.address, " holds ", plan.model.name(),
                       " (fingerprint ", plan.model.fingerprint(), "), worker ", stage.address, " holds ", model.name(),
                       " (fingerprint ", model.fingerprint(), ")"));
    }
    if (InitialStates(stage.worker) != InitialStates(first.worker)) {
      return absl::FailedPreconditionError(
          absl::StrCat("two lists of tuned states in one pipeline: worker ", first.address, " has ",
                       InitialStates(first.worker), ", worker ", stage.address, " has ", InitialStates(stage.worker)));
    }
    if (Layout(stage.worker) != Layout(first.worker)) {
      return absl::FailedPreconditionError(absl::StrCat("two state layouts in one pipeline: worker ", first.address,
                                                        " has ", Layout(first.worker), ", worker ", stage.address,
                                                        " has ", Layout(stage.worker)));
    }
    if (stage.worker.numeric_family() != first.worker.numeric_family()) {
      return absl::FailedPreconditionError(
          absl::StrCat("two numeric families in one pipeline, which would give other bits than one: worker ",
                       Kernels(first), ", worker ", Kernels(stage)));
    }
    plan.slots = std::min(plan.slots, stage.worker.slots());
    plan.max_batch_rows = std::min(plan.max_batch_rows, stage.worker.max_batch_tokens());
    const uint64_t context = stage.worker.max_context_tokens();
    if (context != 0 && (plan.model.max_context_tokens() == 0 || context < plan.model.max_context_tokens())) {
      plan.model.set_max_context_tokens(context);
    }
  }

  // Who is missing may be restarting: clients are to try again.
  int end = 0;
  const StagePlan::Stage* previous = nullptr;
  for (const StagePlan::Stage& stage : plan.stages) {
    if (stage.worker.first_layer() < end) {
      return absl::UnavailableError(
          absl::StrCat("layers overlap: worker ", Layers(*previous), " and worker ", Layers(stage)));
    }
    if (stage.worker.first_layer() > end) {
      return absl::UnavailableError(absl::StrCat(
          "layers ", end, ":", stage.worker.first_layer(), " are missing: ",
          previous == nullptr ? std::string() : absl::StrCat("worker ", Layers(*previous), " is followed by "),
          "worker ", Layers(stage), previous == nullptr ? " comes first" : ""));
    }
    end = stage.worker.end_layer();
    previous = &stage;
  }
  if (end != plan.model.layer_count()) {
    return absl::UnavailableError(absl::StrCat("layers ", end, ":", plan.model.layer_count(), " are missing: worker ",
                                               Layers(*previous), " comes last"));
  }
  return plan;
}

}  // namespace rwkv::router
