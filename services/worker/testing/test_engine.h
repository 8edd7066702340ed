// Engines over small models, and a pipeline of them without threads or links.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/base/device.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

// Devices beside those that kernels::OpenDevice() knows: the best of them, but its stream runs only when somebody waits
// for it, and with its memory out of the host's reach; and the CUDA backend without a GPU
// (kernels/cuda/testing/emulated_cuda.h).
inline constexpr char kLazyDevice[] = "lazy";
inline constexpr char kProtectedDevice[] = "protected";

struct TestEngineOptions {
  int slots = 8;
  int max_batch_tokens = 64;
  float group_norm_epsilon = 64e-5f;
  int deep_embed_context = 256;
  std::string device = "auto";
  int threads = 0;                          // As OpenDevice() takes it.
  std::vector<std::string> initial_states;  // "NAME=FILE"
  // What the opened device is put into, as the last thing; null: nothing.
  std::function<std::unique_ptr<kernels::Device>(std::unique_ptr<kernels::Device>)> wrap;
};

// The fingerprint of every test engine.
inline constexpr char kTestFingerprint[] = "0123456789abcdef0123456789abcdef";

// Stage `stage` of `stages` of the model at `path`.
absl::StatusOr<std::unique_ptr<StageEngine>> MakeTestEngine(const std::string& path, int stage, int stages,
                                                            const TestEngineOptions& options);

// The stages of one model, called one after the other: the plain twin of the real pipeline. Dies on errors that tests
// do not expect.
class EnginePipeline {
 public:
  EnginePipeline(const std::string& path, int stages, const TestEngineOptions& options = {});

  StageEngine& stage(int index) { return *stages_[index]; }
  StageEngine& last() { return *stages_.back(); }
  int vocab_size() const { return static_cast<int>(stages_[0]->model().weights().config().vocab_size); }

  // The first error of any stage.
  absl::Status Attach(const v1::AttachSequence& attach);
  absl::Status AttachFresh(int slot, uint64_t sequence, const v1::Sampling& sampling = {},
                           const std::string& initial_state = "");

  // Numbers the step itself.
  absl::StatusOr<StepOutput> Step(v1::Step step);
  // A step of one entry.
  absl::StatusOr<StepOutput> Feed(int slot, uint64_t sequence, uint64_t position, const std::vector<uint32_t>& tokens,
                                  bool logits = true, bool sample = false);

  // All layers, in order.
  absl::StatusOr<std::vector<std::string>> CopyState(int slot, uint64_t sequence, uint64_t position);
  // As after SnapshotTransfer: attaches from a manifest and installs the records of all layers.
  absl::Status Restore(int slot, uint64_t sequence, uint64_t position, const std::vector<std::string>& records);

 private:
  std::vector<std::unique_ptr<StageEngine>> stages_;
  uint64_t steps_ = 0;
};

// Puts one stage's output where the next one's next step looks for it.
const LinkFrame* Pass(const LinkFrame& frame, StageEngine& next);

// As a loader does with what comes from the store.
absl::Status Fill(StateCopy& state, absl::Span<const std::string> records);
// As the runner does with it.
absl::Status Install(StageEngine& stage, int slot, uint64_t sequence, absl::Span<const std::string> records);

// Of a step's messages for one sequence, in order, as raw bytes: equal bits and nothing else are equal.
std::string LogitsOf(const StepOutput& output, uint64_t sequence);

v1::StepEntry Entry(int slot, uint64_t sequence, uint64_t position, const std::vector<uint32_t>& tokens,
                    bool logits = true, bool sample = false);

// A manifest over one record per layer, with right sizes; checksums are left out.
v1::SnapshotManifest ManifestOf(const std::string& id, uint64_t position, const std::vector<std::string>& records);

}  // namespace rwkv::worker
