#include "kernels/cuda/cuda_stream.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_status.h"

namespace rwkv::kernels::cuda {

absl::StatusOr<std::unique_ptr<CudaEvent>> CudaEvent::Create(const Runtime& runtime) {
  cudaEvent_t event = nullptr;
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.event_create_with_flags(&event, cudaEventDisableTiming), "new event"));
  return std::unique_ptr<CudaEvent>(new CudaEvent(runtime, event));
}

absl::Status CudaEvent::WaitOnHost() const {
  return ToStatus(runtime_, runtime_.event_synchronize(event_), "wait for an event");
}

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Create(const Runtime& runtime, const KernelSet& kernels,
                                                               int ordinal, Device& device) {
  cudaStream_t stream = nullptr;
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.set_device(ordinal), device.name()));
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.stream_create_with_flags(&stream, cudaStreamNonBlocking),
                                absl::StrCat(device.name(), ": new stream")));
  return std::unique_ptr<CudaStream>(new CudaStream(runtime, kernels, ordinal, device, stream));
}

CudaStream::~CudaStream() {
  runtime_.stream_synchronize(stream_);  // What is enqueued may use the scratch memory.
  runtime_.stream_destroy(stream_);
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
    RWKV_RETURN_IF_ERROR(Synchronize());
    int64_t larger = kBufferAlignment;
    while (larger < bytes && larger < int64_t{1} << 62) larger *= 2;
    scratch_ = Buffer();
    RWKV_ASSIGN_OR_RETURN(scratch_, device_.Allocate(std::max(larger, bytes), MemoryKind::kDevice));
  }
  return scratch_.data();
}

absl::Status CudaStream::Synchronize() { return Check("synchronize", runtime_.stream_synchronize(stream_)); }

}  // namespace rwkv::kernels::cuda
