#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/testing/test_engine.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"
#include "tests/testing/random_model.h"

namespace rwkv::gpu {
namespace {

constexpr int kSequences = 4;
constexpr uint64_t kPrompt = 6;

using Records = std::vector<std::string>;

absl::Status CheckEntries(const worker::StepOutput& output) {
  for (const v1::EntryResult& entry : output.result.entries()) {
    if (entry.status().code() != 0) return absl::InternalError(entry.status().message());
  }
  return absl::OkStatus();
}

v1::Step StepOf(uint64_t id, uint64_t position, int first, int tokens) {
  v1::Step step;
  step.set_step_id(id);
  for (int slot = first; slot < kSequences; ++slot) {
    std::vector<uint32_t> ids;
    for (int t = 0; t < tokens; ++t) ids.push_back(static_cast<uint32_t>(position + 3 * t + 7 * slot) % 100 + 1);
    *step.add_entries() = worker::Entry(slot, slot + 1, position, ids, false, true);
  }
  return step;
}

// A prompt each; a save of the first sequence; and steps of all others before the save is looked at.
absl::StatusOr<Records> Epoch(worker::StageEngine& engine) {
  RWKV_RETURN_IF_ERROR(engine.Reset());
  for (int slot = 0; slot < kSequences; ++slot) {
    v1::AttachSequence attach;
    attach.set_slot(slot);
    attach.set_sequence(slot + 1);
    attach.set_fresh(true);
    RWKV_RETURN_IF_ERROR(engine.Attach(attach));
  }
  RWKV_RETURN_IF_ERROR(engine.Enqueue(StepOf(1, 0, 0, kPrompt), nullptr));
  v1::SaveSnapshot save;
  save.set_slot(0);
  save.set_sequence(1);
  save.set_expected_position(kPrompt);
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<worker::StateCopy> state, engine.CopyState(save));
  for (uint64_t step = 2; step <= 4; ++step) {
    RWKV_RETURN_IF_ERROR(engine.Enqueue(StepOf(step, kPrompt + step - 2, 1, 1), nullptr));
    RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, engine.Finish());
    RWKV_RETURN_IF_ERROR(CheckEntries(output));
  }
  Records records;
  RWKV_ASSIGN_OR_RETURN(const std::vector<absl::Span<const char>> saved, state->Records(0));
  for (const absl::Span<const char> record : saved) records.emplace_back(record.data(), record.size());
  RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, engine.Finish());
  RWKV_RETURN_IF_ERROR(CheckEntries(output));
  return records;
}

}  // namespace

absl::Status Epochs(const std::string& device, const std::string& folder, int epochs) {
  testing::RandomModelOptions model;
  model.width = 128;
  model.head_size = 64;
  const std::string path = absl::StrCat(folder, "/epochs.safetensors");
  RWKV_RETURN_IF_ERROR(testing::WriteRandomModel(model, path));
  worker::TestEngineOptions options;
  options.device = device;
  options.slots = kSequences;
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<worker::StageEngine> engine, worker::MakeTestEngine(path, 0, 1, options));

  Records first;
  int64_t least = 0;
  const int settled = std::min(10, epochs / 2);  // By then everything has been allocated that ever is.
  for (int epoch = 0; epoch < epochs; ++epoch) {
    RWKV_ASSIGN_OR_RETURN(Records records, Epoch(*engine));
    if (epoch == 0) first = records;
    if (records != first) return absl::InternalError(absl::StrCat("epoch ", epoch, " has saved another state"));
    RWKV_ASSIGN_OR_RETURN(const int64_t free, FreeMemory(RuntimeOf(device)));
    if (epoch == settled) least = free;
    if (epoch > settled && free < least) {
      return absl::InternalError(absl::StrFormat(
          "after %d epochs %d bytes of the device's memory are free, %d after %d", epoch, free, least, settled));
    }
  }
  std::cout << absl::StrFormat("{\"epochs\": %d, \"free_bytes\": %d}", epochs, least) << std::endl;
  return absl::OkStatus();
}

}  // namespace rwkv::gpu
