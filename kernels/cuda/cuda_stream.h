// Streams and events over CUDA's runtime.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/base/buffer.h"
#include "kernels/base/device.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/stream.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/library_products.h"
#include "kernels/cuda/runtime.h"

namespace rwkv::kernels::cuda {

class CudaEvent final : public Event {
 public:
  static absl::StatusOr<std::unique_ptr<CudaEvent>> Create(const Runtime& runtime, absl::Duration hang_limit);
  ~CudaEvent() override { runtime_.event_destroy(event_); }

  // True after a fault as well, of which WaitOnHost() tells.
  bool Done() const override { return runtime_.event_query(event_) != cudaErrorNotReady; }
  absl::Status WaitOnHost() const override;
  // Without a word on faults.
  absl::Status WaitUntilDone() const;
  cudaEvent_t handle() const { return event_; }

 private:
  CudaEvent(const Runtime& runtime, cudaEvent_t event, absl::Duration hang_limit)
      : runtime_(runtime), event_(event), hang_limit_(hang_limit) {}

  const Runtime& runtime_;
  const cudaEvent_t event_;
  const absl::Duration hang_limit_;
};

class CudaStream final : public RepeatingStream {
 public:
  // The device and its library outlive the stream, which is of its ordinal.
  static absl::StatusOr<std::unique_ptr<CudaStream>> Create(const Runtime& runtime, const KernelSet& kernels,
                                                            int ordinal, Device& device, const DeviceOptions& options,
                                                            const LibraryProducts* library = nullptr);
  ~CudaStream() override;

  absl::Status Copy(void* to, const void* from, int64_t bytes) override;
  absl::Status Zero(void* memory, int64_t bytes) override;
  absl::Status Record(Event& event) override;
  // Waits for the stream when it has to grow, which is seldom.
  absl::StatusOr<void*> Scratch(int64_t bytes) override;
  absl::Status Synchronize() override;
  // The first time it calls; the second time, or when it is prepared, it makes a graph of what is enqueued; then it
  // launches that. No more than kMostGraphs: other keys are called each time, and so is one that no graph can be made
  // of.
  absl::Status Repeat(absl::Span<const int64_t> key, absl::FunctionRef<absl::Status()> enqueue) override;
  void Prepare(absl::Span<const int64_t> key, absl::FunctionRef<absl::Status()> enqueue) override;
  bool Repeats() const override { return options_.graphs; }
  const Repeated& repeated() const override { return repeated_; }
  void* handle() const override { return stream_; }
  ProductsBy products_by() const { return options_.products_by; }
  const LibraryProducts* library() const { return library_; }  // Null: none is asked for.
  // The library cannot go on: from now on Synchronize() fails with `why`, which is given back, so that whoever owns the
  // device ends. Of a capture it is nothing but a graph that cannot be made.
  absl::Status Break(absl::Status why);

  static constexpr size_t kMostGraphs = 64;

  // Enqueues a function of the kernel set.
  template <typename Args>
  absl::Status Run(absl::string_view op, int (*KernelSet::*kernel)(const Args&, LaunchStream), const Args& args) {
    RWKV_RETURN_IF_ERROR(Check(op, runtime_.set_device(ordinal_)));
    return Check(op, static_cast<cudaError_t>((kernels_.*kernel)(args, {stream_, options_.overlaps})));
  }

 private:
  CudaStream(const Runtime& runtime, const KernelSet& kernels, int ordinal, Device& device, cudaStream_t stream,
             const DeviceOptions& options, const LibraryProducts* library, std::unique_ptr<CudaEvent> passed)
      : runtime_(runtime),
        kernels_(kernels),
        ordinal_(ordinal),
        device_(device),
        stream_(stream),
        options_(options),
        library_(library),
        passed_(std::move(passed)) {}

  absl::Status Check(absl::string_view what, cudaError_t error) const;
  // The stream has passed all of them.
  void DropGraphs();
  absl::StatusOr<cudaGraphExec_t> Capture(absl::FunctionRef<absl::Status()> enqueue);
  // Of the key's; counts.
  void MakeGraph(const std::vector<int64_t>& key, absl::FunctionRef<absl::Status()> enqueue);

  const Runtime& runtime_;
  const KernelSet& kernels_;
  const int ordinal_;
  Device& device_;
  const cudaStream_t stream_;
  const DeviceOptions options_;
  const LibraryProducts* const library_;
  const std::unique_ptr<CudaEvent> passed_;  // For Synchronize().
  Buffer scratch_;
  bool captures_ = false;
  absl::Status broken_;
  struct Graph {
    cudaGraphExec_t executable = nullptr;  // Null: seen once, or
    bool failed = false;                   // there can be none.
  };
  absl::flat_hash_map<std::vector<int64_t>, Graph> graphs_;
  Repeated repeated_;
};

}  // namespace rwkv::kernels::cuda
