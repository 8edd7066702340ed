#include "kernels/cuda/runtime.h"

#include <cuda_runtime_api.h>

namespace rwkv::kernels::cuda {

const Runtime kCudaRuntime = {
    cudaGetDeviceCount,
    cudaGetDeviceProperties,
    cudaSetDevice,
    cudaMalloc,
    cudaMemGetInfo,
    cudaHostAlloc,
    cudaMemcpyAsync,
    cudaMemsetAsync,
    cudaStreamCreateWithFlags,
    cudaStreamDestroy,
    cudaStreamSynchronize,
    cudaEventCreateWithFlags,
    cudaEventDestroy,
    [](cudaEvent_t event, cudaStream_t stream) { return cudaEventRecord(event, stream); },
    cudaEventQuery,
    cudaEventSynchronize,
    cudaStreamBeginCapture,
    cudaStreamEndCapture,
    cudaGraphInstantiateWithFlags,
    cudaGraphLaunch,
    cudaGraphDestroy,
    cudaGraphExecDestroy,
    cudaGetErrorName,
    cudaGetErrorString,
    // Nobody is left to hear of an error; whoever works with the device hears of it.
    [](void* memory, int64_t) { cudaFree(memory); },
    [](void* memory, int64_t) { cudaFreeHost(memory); },
};

}  // namespace rwkv::kernels::cuda
