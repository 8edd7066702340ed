// step_timeline MODEL DEVICE THREADS SECONDS BATCH: where the time of a decode step goes, in one stage without RPC, as
// a line of JSON:
//   {"batch": B, "threads": N, "steps": K, "step_us": X, "ops": [{"kind": "products", "detail": "768x768 x 3",
//    "bytes": N, "begin_us": X, "end_us": X, "best_us": X}, ...]}
// begin and end are those of the step of the median time, from its begin; best is the operation's quickest time of all
// steps. What lies between operations is the engine's own: sampling, answers, copies.
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <numeric>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "kernels/base/device.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/testing/test_engine.h"
#include "tests/bench/timed_device.h"

namespace rwkv::bench {
namespace {

struct TimedStep {
  double begin = 0;
  double end = 0;
  std::vector<TimedOp> ops;
};

absl::StatusOr<std::vector<TimedStep>> Decode(worker::EnginePipeline& pipeline, int batch, double seconds,
                                              std::vector<TimedOp>* log) {
  constexpr size_t kWarmUp = 2, kAtLeast = 5;
  for (int s = 0; s < batch; ++s) RWKV_RETURN_IF_ERROR(pipeline.AttachFresh(s, s + 1));
  std::vector<uint32_t> next(batch);
  for (int s = 0; s < batch; ++s) next[s] = 1 + s % 100;
  std::vector<TimedStep> steps;
  const double end = SteadySeconds() + seconds;
  for (uint64_t position = 0; steps.size() < kWarmUp + kAtLeast || SteadySeconds() < end; ++position) {
    v1::Step step;
    for (int s = 0; s < batch; ++s) *step.add_entries() = worker::Entry(s, s + 1, position, {next[s]}, false, true);
    log->clear();
    TimedStep timed;
    timed.begin = SteadySeconds();
    RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, pipeline.Step(std::move(step)));
    timed.end = SteadySeconds();
    timed.ops = *log;
    steps.push_back(std::move(timed));
    for (int s = 0; s < batch; ++s) {
      const v1::EntryResult& entry = output.result.entries(s);
      if (entry.status().code() != 0) return absl::InternalError(entry.status().message());
      next[s] = entry.token_id();
    }
  }
  steps.erase(steps.begin(), steps.begin() + kWarmUp);
  return steps;
}

void Print(std::vector<TimedStep> steps, int batch, int threads) {
  std::vector<double> best(steps.front().ops.size(), 1e9);
  for (const TimedStep& step : steps) {
    for (size_t i = 0; i < best.size(); ++i) best[i] = std::min(best[i], step.ops[i].end - step.ops[i].begin);
  }
  std::nth_element(steps.begin(), steps.begin() + steps.size() / 2, steps.end(),
                   [](const TimedStep& a, const TimedStep& b) { return a.end - a.begin < b.end - b.begin; });
  const TimedStep& median = steps[steps.size() / 2];
  const auto us = [&](double at) { return (at - median.begin) * 1e6; };
  std::cout << absl::StrFormat("{\"batch\": %d, \"threads\": %d, \"steps\": %d, \"step_us\": %.1f, \"ops\": [", batch,
                               threads, steps.size(), us(median.end));
  for (size_t i = 0; i < best.size(); ++i) {
    const TimedOp& op = median.ops[i];
    std::cout << absl::StrFormat(
        "%s{\"kind\": \"%s\", \"detail\": \"%s\", \"bytes\": %d, \"begin_us\": %.1f, \"end_us\": %.1f, \"best_us\": "
        "%.1f}",
        i == 0 ? "" : ", ", op.kind, op.detail, op.bytes, us(op.begin), us(op.end), best[i] * 1e6);
  }
  std::cout << "]}" << std::endl;
}

int Main(int argc, char** argv) {
  worker::TestEngineOptions options;
  double seconds = 0;
  int batch = 0;
  if (argc != 6 || !absl::SimpleAtoi(argv[3], &options.threads) || !absl::SimpleAtod(argv[4], &seconds) ||
      !absl::SimpleAtoi(argv[5], &batch) || batch < 1 || batch > 8192) {
    std::cerr << "usage: step_timeline MODEL DEVICE THREADS SECONDS BATCH" << std::endl;
    return 2;
  }
  std::vector<TimedOp> log;
  options.device = argv[2];
  options.slots = options.max_batch_tokens = batch;
  options.wrap = [&log](std::unique_ptr<kernels::Device> device) { return TimeDevice(std::move(device), &log); };
  worker::EnginePipeline pipeline(argv[1], 1, options);
  const absl::StatusOr<std::vector<TimedStep>> steps = Decode(pipeline, batch, seconds, &log);
  if (!steps.ok()) {
    std::cerr << "step_timeline: " << steps.status() << std::endl;
    return 1;
  }
  Print(*steps, batch, options.threads);
  return 0;
}

}  // namespace
}  // namespace rwkv::bench

int main(int argc, char** argv) { return rwkv::bench::Main(argc, argv); }
