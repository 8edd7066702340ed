// rwkv.v1.Worker over a StageRunner.
#pragma once

#include <memory>

#include "grpcpp/server_context.h"
#include "grpcpp/support/server_callback.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/router_registry.h"
#include "services/worker/engine/stage_runner.h"

namespace rwkv::worker {

class LiveStreams;

// Thread-safe. Destroy it after its server was shut down, and before the runner.
class WorkerService final : public v1::Worker::CallbackService {
 public:
  // `description` is what Describe answers, but for what changes. `runner` and `routers` are borrowed and outlive the
  // server.
  WorkerService(v1::DescribeResponse description, StageRunner* runner, RouterRegistry* routers);
  // Waits until gRPC has let go of the last stream, and with it of the last epoch.
  ~WorkerService() override;

  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* context, const v1::DescribeRequest* request,
                                     v1::DescribeResponse* response) override;
  grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* Execute(
      grpc::CallbackServerContext* context) override;

 private:
  const v1::DescribeResponse description_;
  StageRunner* const runner_;
  RouterRegistry* const routers_;
  const std::shared_ptr<LiveStreams> live_streams_;
};

}  // namespace rwkv::worker
