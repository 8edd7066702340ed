#include <algorithm>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/testing/test_engine.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"
#include "tests/testing/random_model.h"

namespace rwkv::gpu {
namespace {

constexpr int kSlots = 5;
constexpr int kSteps = 20;

struct Decoded {
  std::vector<std::string> logits;  // Of every step and row.
  kernels::RepeatingStream::Repeated repeated;
  double seconds_a_step = 0;  // Of one row, the median.
};

absl::Status Step(worker::EnginePipeline& engine, int rows, std::vector<uint64_t>& positions, Decoded& decoded) {
  v1::Step step;
  for (int slot = 0; slot < rows; ++slot) {
    const uint64_t position = positions[slot]++;
    *step.add_entries() = worker::Entry(slot, slot + 1, position, {static_cast<uint32_t>(7 * position + slot) % 100});
  }
  RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, engine.Step(std::move(step)));
  for (int slot = 0; slot < rows; ++slot) decoded.logits.push_back(worker::LogitsOf(output, slot + 1));
  return absl::OkStatus();
}

absl::StatusOr<Decoded> Decode(const std::string& device, const std::string& path) {
  worker::TestEngineOptions options;
  options.device = device;
  options.slots = kSlots;
  worker::EnginePipeline engine(path, 1, options);
  RWKV_RETURN_IF_ERROR(engine.last().WarmUp());
  for (int slot = 0; slot < kSlots; ++slot) RWKV_RETURN_IF_ERROR(engine.AttachFresh(slot, slot + 1));
  Decoded decoded;
  std::vector<uint64_t> positions(kSlots);
  for (int step = 0; step < kSteps; ++step) {
    RWKV_RETURN_IF_ERROR(Step(engine, 1 + step % kSlots, positions, decoded));
  }
  std::vector<double> seconds;
  for (int step = 0; step < kSteps; ++step) {
    const double begin = Now();
    RWKV_RETURN_IF_ERROR(Step(engine, 1, positions, decoded));
    seconds.push_back(Now() - begin);
  }
  std::sort(seconds.begin(), seconds.end());
  decoded.seconds_a_step = seconds[seconds.size() / 2];
  if (engine.last().repeating() != nullptr) decoded.repeated = engine.last().repeating()->repeated();
  return decoded;
}

}  // namespace

absl::Status Graphs(const std::string& device, const std::string& folder) {
  testing::RandomModelOptions model;
  model.width = 128;
  model.head_size = 64;
  const std::string path = absl::StrCat(folder, "/graphs.safetensors");
  RWKV_RETURN_IF_ERROR(testing::WriteRandomModel(model, path));
  RWKV_ASSIGN_OR_RETURN(const Decoded graphs, Decode(device, path));
  RWKV_ASSIGN_OR_RETURN(const Decoded launches, Decode(absl::StrCat(device, "/launches"), path));
  if (graphs.repeated.failures > 0) return graphs.repeated.last_failure;
  if (graphs.repeated.ready == 0) return absl::InternalError("no graph was made");
  if (graphs.logits.empty() || graphs.logits.size() != launches.logits.size()) {
    return absl::InternalError("other numbers of logits");
  }
  if (launches.repeated.ready > 0) return absl::InternalError("graphs were made where only launches were asked for");
  for (size_t i = 0; i < graphs.logits.size(); ++i) {
    if (graphs.logits[i] == launches.logits[i]) continue;
    return absl::InternalError(
        absl::StrFormat("logits %d of %d are others than those of launches", i + 1, graphs.logits.size()));
  }
  std::cout << absl::StrFormat("{\"graphs\": %d, \"us_a_step\": %.1f, \"us_a_step_launched\": %.1f}\n",
                               graphs.repeated.ready, graphs.seconds_a_step * 1e6, launches.seconds_a_step * 1e6)
            << absl::StrFormat("SAYS: %d graphs; a step of one row of a small model takes %.1f us, launched %.1f",
                               graphs.repeated.ready, graphs.seconds_a_step * 1e6, launches.seconds_a_step * 1e6)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace rwkv::gpu
