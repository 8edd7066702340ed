#include <cuda_runtime.h>

#include "bazel/rules/cuda_library_test/square.h"

namespace rwkv {
namespace {

__global__ void Square(float* values, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) values[i] *= values[i];
}

}  // namespace

std::string SquareOnDevice(float* values, int count, bool* no_device) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  *no_device = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || devices == 0;
  float* on_device = nullptr;
  if (error == cudaSuccess) error = cudaMalloc(&on_device, count * sizeof(float));
  if (error == cudaSuccess) error = cudaMemcpy(on_device, values, count * sizeof(float), cudaMemcpyHostToDevice);
  if (error == cudaSuccess) {
    Square<<<(count + 127) / 128, 128>>>(on_device, count);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaMemcpy(values, on_device, count * sizeof(float), cudaMemcpyDeviceToHost);
  cudaFree(on_device);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace rwkv
