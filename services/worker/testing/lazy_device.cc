#include "services/worker/testing/lazy_device.h"

#include <cstdint>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/stream.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {
namespace {

// What a stream and its events share.
class Queue {
 public:
  using Work = std::function<absl::Status(kernels::Stream&)>;

  explicit Queue(std::unique_ptr<kernels::Stream> stream) : stream_(std::move(stream)) {}

  absl::Status Push(Work work) {
    absl::MutexLock lock(&mu_);
    work_.push_back(std::move(work));
    ++enqueued_;
    return absl::OkStatus();
  }
  uint64_t enqueued() {
    absl::MutexLock lock(&mu_);
    return enqueued_;
  }
  bool HasRun(uint64_t point) {
    absl::MutexLock lock(&mu_);
    return enqueued_ - work_.size() >= point;
  }
  absl::Status RunUntil(uint64_t point) {
    absl::MutexLock lock(&mu_);
    while (enqueued_ - work_.size() < point) {
      absl::Status status = work_.front()(*stream_);
      work_.pop_front();
      if (fault_.ok()) fault_ = std::move(status);
    }
    return fault_;
  }

 private:
  const std::unique_ptr<kernels::Stream> stream_;
  absl::Mutex mu_;
  std::deque<Work> work_ ABSL_GUARDED_BY(mu_);
  uint64_t enqueued_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status fault_ ABSL_GUARDED_BY(mu_);
};

class LazyEvent final : public kernels::Event {
 public:
  void Set(std::shared_ptr<Queue> queue) {
    absl::MutexLock lock(&mu_);
    point_ = queue->enqueued();
    queue_ = std::move(queue);
  }
  bool Done() const override {
    absl::MutexLock lock(&mu_);
    return queue_ == nullptr || queue_->HasRun(point_);
  }
  absl::Status WaitOnHost() const override {
    absl::MutexLock lock(&mu_);
    return queue_ == nullptr ? absl::OkStatus() : queue_->RunUntil(point_);
  }

 private:
  mutable absl::Mutex mu_;
  std::shared_ptr<Queue> queue_ ABSL_GUARDED_BY(mu_);
  uint64_t point_ ABSL_GUARDED_BY(mu_) = 0;
};

class LazyStream final : public kernels::Stream {
 public:
  explicit LazyStream(std::unique_ptr<kernels::Stream> stream) : queue_(std::make_shared<Queue>(std::move(stream))) {}

  absl::Status Push(Queue::Work work) { return queue_->Push(std::move(work)); }

  absl::Status Copy(void* to, const void* from, int64_t bytes) override {
    return Push([=](kernels::Stream& stream) { return stream.Copy(to, from, bytes); });
  }
  absl::Status Zero(void* memory, int64_t bytes) override {
    return Push([=](kernels::Stream& stream) { return stream.Zero(memory, bytes); });
  }
  absl::Status Record(kernels::Event& event) override {
    static_cast<LazyEvent&>(event).Set(queue_);
    return absl::OkStatus();
  }
  absl::StatusOr<void*> Scratch(int64_t bytes) override {
    return absl::InternalError("the operations' own stream has scratch memory");
  }
  absl::Status Synchronize() override { return queue_->RunUntil(queue_->enqueued()); }

 private:
  const std::shared_ptr<Queue> queue_;
};

class LazyDevice final : public kernels::Device {
 public:
  explicit LazyDevice(std::unique_ptr<kernels::Device> device) : device_(std::move(device)) {}

  absl::string_view name() const override { return device_->name(); }
  absl::string_view numeric_family() const override { return device_->numeric_family(); }
  absl::StatusOr<kernels::Buffer> Allocate(int64_t bytes, kernels::MemoryKind kind) override {
    return device_->Allocate(bytes, kind);
  }
  absl::StatusOr<std::unique_ptr<kernels::Stream>> NewStream() override {
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Stream> stream, device_->NewStream());
    return std::make_unique<LazyStream>(std::move(stream));
  }
  absl::StatusOr<std::unique_ptr<kernels::Event>> NewEvent() override { return std::make_unique<LazyEvent>(); }
  absl::StatusOr<kernels::Weight> Load(const kernels::MatrixView& matrix, kernels::WeightUse use) override {
    return device_->Load(matrix, use);
  }
  const kernels::OpTable& ops() const override { return device_->ops(); }

 private:
  const std::unique_ptr<kernels::Device> device_;
};

class LazyModel final : public StageModel {
 public:
  explicit LazyModel(std::unique_ptr<StageModel> model) : model_(std::move(model)) {}

  const StageWeights& weights() const override { return model_->weights(); }
  const StateLayout& state_layout() const override { return model_->state_layout(); }
  int64_t v_first_width() const override { return model_->v_first_width(); }
  int64_t max_tokens() const override { return model_->max_tokens(); }
  absl::Span<const float> InitialState(int stage_layer, int tensor) const override {
    return model_->InitialState(stage_layer, tensor);
  }

  absl::Status Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) override {
    const std::vector<kernels::SequenceSpan> spans(step.spans.begin(), step.spans.end());
    const std::vector<int32_t> tokens(step.tokens, step.tokens + step.rows);
    const std::vector<int64_t> logit_rows(step.logit_rows.begin(), step.logit_rows.end());
    const std::vector<int64_t> hidden_rows(step.hidden_rows.begin(), step.hidden_rows.end());
    return static_cast<LazyStream&>(stream).Push(
        [this, step, state, spans, tokens, logit_rows, hidden_rows](kernels::Stream& inner) {
          StageStep late = step;
          late.spans = spans;
          late.tokens = tokens.data();
          late.logit_rows = logit_rows;
          late.hidden_rows = hidden_rows;
          return model_->Forward(late, state, inner);
        });
  }

 private:
  const std::unique_ptr<StageModel> model_;
};

}  // namespace

std::unique_ptr<kernels::Device> MakeLazy(std::unique_ptr<kernels::Device> device) {
  return std::make_unique<LazyDevice>(std::move(device));
}

std::unique_ptr<StageModel> MakeLazy(std::unique_ptr<StageModel> model) {
  return std::make_unique<LazyModel>(std::move(model));
}

}  // namespace rwkv::worker
