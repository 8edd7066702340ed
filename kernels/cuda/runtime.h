// The functions of CUDA's runtime that the device uses, as a table: CUDA's own in the product, and for tests a fake
// (testing/fake_runtime.h), both in one program if need be. Names and contracts are CUDA's. With kernel_set.h the only
// way to a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/base/buffer.h"

namespace rwkv::kernels::cuda {

struct Runtime {
  cudaError_t (*get_device_count)(int* count);  // Leaves it as it is where there is no driver.
  cudaError_t (*get_device_properties)(cudaDeviceProp* properties, int device);
  cudaError_t (*set_device)(int device);  // Of the calling thread.
  cudaError_t (*malloc)(void** memory, size_t bytes);
  cudaError_t (*mem_get_info)(size_t* free, size_t* total);  // bytes, of the thread's device
  cudaError_t (*host_alloc)(void** memory, size_t bytes, unsigned int flags);
  cudaError_t (*memcpy_async)(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
  cudaError_t (*memset_async)(void* memory, int value, size_t bytes, cudaStream_t stream);
  cudaError_t (*stream_create_with_flags)(cudaStream_t* stream, unsigned int flags);
  cudaError_t (*stream_destroy)(cudaStream_t stream);
  cudaError_t (*stream_synchronize)(cudaStream_t stream);
  cudaError_t (*event_create_with_flags)(cudaEvent_t* event, unsigned int flags);
  cudaError_t (*event_destroy)(cudaEvent_t event);
  cudaError_t (*event_record)(cudaEvent_t event, cudaStream_t stream);
  cudaError_t (*event_query)(cudaEvent_t event);
  cudaError_t (*event_synchronize)(cudaEvent_t event);
  cudaError_t (*stream_begin_capture)(cudaStream_t stream, cudaStreamCaptureMode mode);
  cudaError_t (*stream_end_capture)(cudaStream_t stream, cudaGraph_t* graph);
  cudaError_t (*graph_instantiate)(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
  cudaError_t (*graph_launch)(cudaGraphExec_t executable, cudaStream_t stream);
  cudaError_t (*graph_destroy)(cudaGraph_t graph);
  cudaError_t (*graph_exec_destroy)(cudaGraphExec_t executable);
  const char* (*get_error_name)(cudaError_t error);
  const char* (*get_error_string)(cudaError_t error);
  // cudaFree and cudaFreeHost, as a Buffer calls them.
  Buffer::Release free;
  Buffer::Release free_host;
};

// Of the CUDA that this program is linked with.
extern const Runtime kCudaRuntime;

}  // namespace rwkv::kernels::cuda
