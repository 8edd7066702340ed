#include "kernels/cuda/cuda_stream.h"

#include <algorithm>
#include <memory>
#include <thread>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_status.h"

namespace rwkv::kernels::cuda {

namespace {

// A host that waits looks again and again: what CUDA's own waits do, but without end. A step is over in this time; for
// what takes longer the processor is worth more than the microseconds.
constexpr absl::Duration kSpin = absl::Milliseconds(5);
constexpr absl::Duration kNap = absl::Microseconds(100);
// Looks between two moments in which other threads may have the processor: on a busy machine each takes milliseconds.
constexpr int kLooks = 64;

}  // namespace

absl::StatusOr<std::unique_ptr<CudaEvent>> CudaEvent::Create(const Runtime& runtime, absl::Duration hang_limit) {
  cudaEvent_t event = nullptr;
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.event_create_with_flags(&event, cudaEventDisableTiming), "new event"));
  return std::unique_ptr<CudaEvent>(new CudaEvent(runtime, event, hang_limit));
}

absl::Status CudaEvent::WaitUntilDone() const {
  const absl::Time begin = absl::Now();
  for (int looks = 1; !Done(); ++looks) {
    if (looks % kLooks != 0) continue;
    const absl::Duration waited = absl::Now() - begin;
    if (waited > hang_limit_) {
      return absl::DeadlineExceededError(
          absl::StrCat("the GPU hangs: work it was given is not done after ", absl::FormatDuration(hang_limit_)));
    }
    waited < kSpin ? std::this_thread::yield() : absl::SleepFor(kNap);
  }
  return absl::OkStatus();
}

absl::Status CudaEvent::WaitOnHost() const {
  RWKV_RETURN_IF_ERROR(WaitUntilDone());
  // Ends at once, and tells of a fault.
  return ToStatus(runtime_, runtime_.event_synchronize(event_), "wait for an event");
}

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Create(const Runtime& runtime, const KernelSet& kernels,
                                                               int ordinal, Device& device,
                                                               const DeviceOptions& options,
                                                               const LibraryProducts* library) {
  cudaStream_t stream = nullptr;
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.set_device(ordinal), device.name()));
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.stream_create_with_flags(&stream, cudaStreamNonBlocking),
                                absl::StrCat(device.name(), ": new stream")));
  absl::StatusOr<std::unique_ptr<CudaEvent>> passed = CudaEvent::Create(runtime, options.hang_limit);
  if (!passed.ok()) {
    runtime.stream_destroy(stream);
    return passed.status();
  }
  return std::unique_ptr<CudaStream>(
      new CudaStream(runtime, kernels, ordinal, device, stream, options, library, *std::move(passed)));
}

CudaStream::~CudaStream() {
  // What is enqueued may use the scratch memory. Of a GPU that hangs nothing can be given back.
  if (absl::IsDeadlineExceeded(Synchronize())) {
    scratch_.Leak();
  } else {
    DropGraphs();
    runtime_.stream_destroy(stream_);
  }
}

absl::Status CudaStream::Check(absl::string_view what, cudaError_t error) const {
  if (error == cudaSuccess) return absl::OkStatus();
  return ToStatus(runtime_, error, absl::StrCat(device_.name(), ": ", what));
}

absl::Status CudaStream::Copy(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  return Check("copy", runtime_.memcpy_async(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_));
}

absl::Status CudaStream::Zero(void* memory, int64_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  return Check("zero", runtime_.memset_async(memory, 0, static_cast<size_t>(bytes), stream_));
}

absl::Status CudaStream::Record(Event& event) {
  return Check("record an event", runtime_.event_record(static_cast<CudaEvent&>(event).handle(), stream_));
}

absl::StatusOr<void*> CudaStream::Scratch(int64_t bytes) {
  if (bytes > scratch_.size_in_bytes()) {
    if (captures_) return absl::InternalError("scratch memory grows while a stream is captured");
    RWKV_RETURN_IF_ERROR(Synchronize());
    int64_t larger = kBufferAlignment;
    while (larger < bytes && larger < int64_t{1} << 62) larger *= 2;
    DropGraphs();  // They point to it.
    scratch_ = Buffer();
    RWKV_ASSIGN_OR_RETURN(scratch_, device_.Allocate(std::max(larger, bytes), MemoryKind::kDevice));
  }
  return scratch_.data();
}

void CudaStream::DropGraphs() {
  for (const auto& [key, graph] : graphs_) {
    if (graph.executable != nullptr) runtime_.graph_exec_destroy(graph.executable);
  }
  graphs_.clear();
  repeated_.ready = repeated_.device_bytes = 0;
}

absl::Status CudaStream::Repeat(absl::Span<const int64_t> key, absl::FunctionRef<absl::Status()> enqueue) {
  if (!options_.graphs || captures_) return enqueue();
  const std::vector<int64_t> owned(key.begin(), key.end());
  auto it = graphs_.find(owned);
  if (it == graphs_.end()) {
    // What is allocated once is there when it comes again.
    RWKV_RETURN_IF_ERROR(enqueue());
    if (graphs_.size() < kMostGraphs) graphs_[owned] = {};
    return absl::OkStatus();
  }
  if (it->second.executable == nullptr && !it->second.failed) {
    MakeGraph(owned, enqueue);
    it = graphs_.find(owned);
  }
  if (it->second.failed) return enqueue();
  return Check("launch a graph", runtime_.graph_launch(it->second.executable, stream_));
}

void CudaStream::Prepare(absl::Span<const int64_t> key, absl::FunctionRef<absl::Status()> enqueue) {
  if (!options_.graphs || captures_) return;
  const std::vector<int64_t> owned(key.begin(), key.end());
  const auto it = graphs_.find(owned);
  if (it == graphs_.end() ? graphs_.size() >= kMostGraphs : it->second.executable != nullptr || it->second.failed) {
    return;
  }
  MakeGraph(owned, enqueue);
}

void CudaStream::MakeGraph(const std::vector<int64_t>& key, absl::FunctionRef<absl::Status()> enqueue) {
  size_t free_before = 0;
  size_t free_after = 0;
  size_t total = 0;
  absl::Status status = Check("graph", runtime_.set_device(ordinal_));
  status.Update(Check("graph", runtime_.mem_get_info(&free_before, &total)));
  if (status.ok()) {
    const absl::StatusOr<cudaGraphExec_t> executable = Capture(enqueue);
    status = executable.status();
    if (executable.ok()) graphs_[key].executable = *executable;
  }
  if (!status.ok()) {
    graphs_[key].failed = true;
    ++repeated_.failures;
    repeated_.last_failure = std::move(status);
    return;
  }
  ++repeated_.ready;
  const bool is_known = runtime_.mem_get_info(&free_after, &total) == cudaSuccess && free_after < free_before;
  if (is_known) repeated_.device_bytes += static_cast<int64_t>(free_before - free_after);
}

absl::StatusOr<cudaGraphExec_t> CudaStream::Capture(absl::FunctionRef<absl::Status()> enqueue) {
  // Other threads may allocate meanwhile.
  RWKV_RETURN_IF_ERROR(Check("capture", runtime_.stream_begin_capture(stream_, cudaStreamCaptureModeThreadLocal)));
  captures_ = true;
  absl::Status status = enqueue();
  captures_ = false;
  cudaGraph_t graph = nullptr;
  status.Update(Check("end of a capture", runtime_.stream_end_capture(stream_, &graph)));
  cudaGraphExec_t executable = nullptr;
  if (status.ok()) status = Check("make a graph", runtime_.graph_instantiate(&executable, graph, 0));
  if (graph != nullptr) runtime_.graph_destroy(graph);
  RWKV_RETURN_IF_ERROR(status);
  return executable;
}

absl::Status CudaStream::Synchronize() {
  RWKV_RETURN_IF_ERROR(Check("synchronize", runtime_.event_record(passed_->handle(), stream_)));
  if (absl::Status status = passed_->WaitUntilDone(); absl::IsDeadlineExceeded(status)) {
    return absl::DeadlineExceededError(absl::StrCat(device_.name(), ": synchronize: ", status.message()));
  }
  // Ends at once, and tells of a fault.
  RWKV_RETURN_IF_ERROR(Check("synchronize", runtime_.stream_synchronize(stream_)));
  return broken_;
}

absl::Status CudaStream::Break(absl::Status why) {
  if (!captures_ && broken_.ok()) broken_ = why;
  return why;
}

}  // namespace rwkv::kernels::cuda
