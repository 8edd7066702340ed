// What a fleet says of itself to others.
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "services/router/pipeline/fleet.h"

namespace rwkv::router {

bool Fleet::OthersDrive(absl::string_view pool) const {
  absl::MutexLock lock(&mu_);
  for (const auto& [address, worker] : workers_) {
    if (!worker->answers || worker->lane != 0 || IsFree(worker->said, options_.lane.router)) continue;
    if (absl::StrCat(worker->said.model().fingerprint(), "/", worker->said.numeric_family()) == pool) return true;
  }
  return false;
}

Fleet::State Fleet::state() const {
  absl::MutexLock lock(&mu_);
  State state = why_not_;
  for (const auto& [epoch, open] : lanes_) {
    if (open.lane->phase() != Lane::Phase::kUp) continue;
    const absl::Status why = open.lane->why();
    if (why.ok()) {
      state.serving = true;
      state.status = absl::OkStatus();
      state.text = "serving";
      state.model = open.lane->plan().model;
    } else if (!state.serving) {
      state.status = absl::UnavailableError(absl::StrCat("no pipeline serves just now: ", why.message()));
      state.text = absl::StrCat("connecting: ", why.message());
    }
  }
  return state;
}

std::vector<Fleet::WorkerStatus> Fleet::Probe(absl::Time deadline) {
  struct Answers {
    absl::Mutex mu;
    int left ABSL_GUARDED_BY(mu) = 0;
    std::map<std::string, absl::StatusOr<v1::DescribeResponse>> by_address ABSL_GUARDED_BY(mu);
  };
  const auto answers = std::make_shared<Answers>();
  std::vector<std::shared_ptr<Worker>> workers;
  {
    absl::MutexLock lock(&mu_);
    for (const auto& [address, worker] : workers_) {
      if (worker->client == nullptr || stopping_) continue;
      workers.push_back(worker);
      BeginAsking(*worker);
    }
  }
  {
    absl::MutexLock lock(&answers->mu);
    answers->left = static_cast<int>(workers.size());
  }
  for (const std::shared_ptr<Worker>& worker : workers) {
    Ask(worker, deadline, [answers, address = worker->address](const absl::StatusOr<v1::DescribeResponse>& answer) {
      absl::MutexLock lock(&answers->mu);
      answers->by_address.emplace(address, answer);
      --answers->left;
    });
  }
  std::map<std::string, absl::StatusOr<v1::DescribeResponse>> by_address;
  {
    absl::MutexLock lock(&answers->mu);
    const auto all = [&answers]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return answers->left == 0; };
    answers->mu.AwaitWithDeadline(absl::Condition(&all), deadline + absl::Milliseconds(100));
    by_address = answers->by_address;
  }
  absl::MutexLock lock(&mu_);
  std::vector<WorkerStatus> statuses;
  for (const auto& [address, worker] : workers_) {
    WorkerStatus& status = statuses.emplace_back();
    status.address = address;
    const auto answer = by_address.find(address);
    status.status =
        answer != by_address.end() ? answer->second.status() : absl::DeadlineExceededError("no answer in time");
    status.worker = worker->said;
    status.stage_index = worker->stage_index;
    status.stage_count = worker->stage_count;
    status.epoch = worker->lane;
  }
  return statuses;
}

std::vector<v1::RouterAnnouncement> Fleet::OtherRouters() const {
  absl::MutexLock lock(&mu_);
  std::vector<v1::RouterAnnouncement> routers;
  for (const auto& [name, router] : routers_) {
    if (absl::Now() - router.second <= kRouterRemembered) routers.push_back(router.first);
  }
  return routers;
}

}  // namespace rwkv::router
