// rwkv.v1.Worker over a StageRunner.
#pragma once

#include "grpcpp/server_context.h"
#include "grpcpp/support/server_callback.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_runner.h"

namespace rwkv::worker {

// Thread-safe.
class WorkerService final : public v1::Worker::CallbackService {
 public:
  // `description` is what Describe answers, but for `draining`. `runner` is borrowed and outlives the server.
  WorkerService(v1::DescribeResponse description, StageRunner* runner);

  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* context, const v1::DescribeRequest* request,
                                     v1::DescribeResponse* response) override;
  grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* Execute(
      grpc::CallbackServerContext* context) override;

 private:
  const v1::DescribeResponse description_;
  StageRunner* const runner_;
};

}  // namespace rwkv::worker
