#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
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

// Both devices round sums of fp32 in another order, of up to 4 * width products; the head's logits are of size one.
constexpr double kTolerance = 2e-3;

// A prompt of 37 tokens for each of three sequences, then a token each: logits of all.
absl::StatusOr<std::vector<float>> Logits(const std::string& device, const std::string& path) {
  worker::TestEngineOptions options;
  options.device = device;
  options.max_batch_tokens = 128;
  worker::EnginePipeline engine(path, 1, options);
  std::string bytes;
  for (const auto& [position, count] : {std::pair<uint64_t, int>{0, 37}, {37, 1}, {38, 1}}) {
    v1::Step step;
    for (int slot = 0; slot < 3; ++slot) {
      if (position == 0) RWKV_RETURN_IF_ERROR(engine.AttachFresh(slot, slot + 1));
      std::vector<uint32_t> ids;
      for (int t = 0; t < count; ++t) ids.push_back(static_cast<uint32_t>(13 * (position + t) + 7 * slot) % 250);
      *step.add_entries() = worker::Entry(slot, slot + 1, position, ids);
    }
    RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, engine.Step(std::move(step)));
    for (int slot = 0; slot < 3; ++slot) bytes += worker::LogitsOf(output, slot + 1);
  }
  std::vector<float> logits(bytes.size() / sizeof(float));
  std::memcpy(logits.data(), bytes.data(), bytes.size());
  return logits;
}

}  // namespace

absl::Status Layers(const std::string& device, const std::string& folder, int64_t width) {
  testing::RandomModelOptions model;
  model.layers = 1;
  model.width = width;
  model.head_size = 64;
  model.vocab_size = 250;
  model.decay_rank = model.iclr_rank = width / 32;
  model.value_residual_rank = 32;
  model.gate_rank = width / 8;
  const std::string path = absl::StrCat(folder, "/layer.safetensors");
  RWKV_RETURN_IF_ERROR(testing::WriteRandomModel(model, path));
  RWKV_ASSIGN_OR_RETURN(const std::vector<float> got, Logits(device, path));
  RWKV_ASSIGN_OR_RETURN(const std::vector<float> expected, Logits("cpu", path));
  double size = 0;
  double worst = 0;
  if (got.size() != expected.size() || got.empty()) return absl::InternalError("other numbers of logits");
  for (size_t i = 0; i < got.size(); ++i) {
    size = std::max(size, std::abs(static_cast<double>(expected[i])));
    const double difference = std::abs(static_cast<double>(got[i]) - static_cast<double>(expected[i]));
    worst = difference <= worst ? worst : difference;  // NaN stays.
  }
  std::cout << absl::StrFormat("SAYS: %d logits of up to %.2f differ by at most %.2g from this machine's CPU's",
                               got.size(), size, worst)
            << std::endl;
  if (!(worst <= kTolerance * std::max(1.0, size))) {
    return absl::InternalError(absl::StrFormat("a logit differs by %g from the CPU's", worst));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::gpu
