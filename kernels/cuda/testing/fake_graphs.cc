// Capture of streams into graphs, and their launches: a graph runs lazily, as a stream does, and has the arguments that
// its kernels had when they were captured.
#include "kernels/cuda/testing/fake_state.h"

namespace rwkv::kernels::cuda::fake {

cudaError_t StreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  RWKV_FAKE_CALL;
  if (stream == nullptr || fake.streams.count(stream) == 0) return cudaErrorStreamCaptureUnsupported;
  if (stream->captured != nullptr) return cudaErrorIllegalState;
  if (mode != cudaStreamCaptureModeThreadLocal) Violate(fake, "a capture that other threads' allocations break");
  stream->captured = std::make_unique<CUgraph_st>();
  stream->capturing_thread = std::this_thread::get_id();
  return cudaSuccess;
}

cudaError_t StreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  RWKV_FAKE_CALL;
  *graph = nullptr;
  if (fake.streams.count(stream) == 0 || stream->captured == nullptr) return cudaErrorIllegalState;
  std::unique_ptr<CUgraph_st> captured = std::move(stream->captured);
  if (stream->capturing_thread != std::this_thread::get_id()) return cudaErrorStreamCaptureWrongThread;
  if (captured->is_broken) return cudaErrorStreamCaptureInvalidated;
  *graph = captured.get();
  fake.graphs[captured.get()] = std::move(captured);
  return cudaSuccess;
}

cudaError_t GraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  RWKV_FAKE_CALL;
  if (IsForbiddenInCapture(fake, "a graph is made")) return cudaErrorStreamCaptureUnsupported;
  if (fake.graphs.count(graph) == 0) return cudaErrorInvalidValue;
  if (fake.faults.fail_graph >= 0 && fake.faults.fail_graph-- == 0) return cudaErrorMemoryAllocation;
  for (const Work& node : graph->nodes) fake.counts.graph_copies += node.kernel == nullptr ? 1 : 0;
  auto made = std::make_unique<CUgraphExec_st>();
  made->nodes = graph->nodes;
  *executable = made.get();
  fake.executables[made.get()] = std::move(made);
  ++fake.counts.graphs;
  return cudaSuccess;
}

cudaError_t GraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  RWKV_FAKE_CALL;
  if (IsForbiddenInCapture(fake, "a graph is launched")) return cudaErrorStreamCaptureUnsupported;
  if (fake.executables.count(executable) == 0) {
    Violate(fake, "a graph is launched that is none");
    return cudaErrorInvalidResourceHandle;
  }
  ++fake.counts.graph_launches;
  for (const Work& node : executable->nodes) {
    const cudaError_t error =
        node.kernel == nullptr ? Enqueue(fake, stream, node.task) : LaunchFromGraph(fake, stream, node);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t GraphDestroy(cudaGraph_t graph) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return fake.graphs.erase(graph) > 0 ? fake.fault : cudaErrorInvalidValue;
}

// What has been launched has its own copies.
cudaError_t GraphExecDestroy(cudaGraphExec_t executable) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return fake.executables.erase(executable) > 0 ? fake.fault : cudaErrorInvalidValue;
}

}  // namespace rwkv::kernels::cuda::fake
