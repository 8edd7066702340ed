// A router in miniature: drives the workers of one pipeline, one command at a time, and waits for every answer.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::worker {

struct DrivenStep {
  v1::StepResult result;
  std::map<uint64_t, std::string> logits;  // By sequence, the rows' raw bytes.
};

// One thread at a time. A stream that ends ends the call that waits with its status.
class PipelineDriver {
 public:
  explicit PipelineDriver(std::vector<std::shared_ptr<WorkerClient>> workers);
  ~PipelineDriver();

  // Opens an epoch on every stage and waits for all.
  absl::Status Open(const std::string& router, const std::string& epoch, const std::string& state_store = "");

  // Every stage's answer; the first error.
  absl::Status Attach(const v1::AttachSequence& attach);
  absl::Status AttachFresh(int slot, uint64_t sequence, const v1::Sampling& sampling = {});
  absl::StatusOr<v1::SnapshotManifest> Save(int slot, uint64_t sequence, uint64_t position, const std::string& id,
                                            const std::string& fingerprint, bool keep = false);
  absl::Status Release(int slot, uint64_t sequence);

  // Numbers the step itself. Waits for its result.
  absl::StatusOr<DrivenStep> Step(v1::Step step);
  absl::StatusOr<DrivenStep> Feed(int slot, uint64_t sequence, uint64_t position, const std::vector<uint32_t>& tokens,
                                  bool logits = true, bool sample = false);

  // The same without waiting, for steps under way.
  absl::Status WriteStep(v1::Step step);
  absl::StatusOr<DrivenStep> ReadStep();

  // A command as it is, to every stage.
  absl::Status WriteAll(const v1::ExecuteRequest& request);

  ExecuteStream& stream(int stage) { return *streams_[stage]; }
  int stages() const { return static_cast<int>(workers_.size()); }
  // Cancels every stream.
  void Close();

 private:
  const std::vector<std::shared_ptr<WorkerClient>> workers_;
  std::vector<std::unique_ptr<ExecuteStream>> streams_;
  uint64_t steps_ = 0;
};

}  // namespace rwkv::worker
