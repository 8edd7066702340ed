// Drives a StageRunner of this process through the router's client interface: the stream without gRPC.
#pragma once

#include <memory>
#include <string>

#include "services/worker/client/worker_client.h"
#include "services/worker/engine/stage_runner.h"

namespace rwkv::worker {

// `runner` is borrowed and outlives the client's streams. Describe is unimplemented.
std::shared_ptr<WorkerClient> MakeRunnerClient(std::string address, StageRunner* runner);

}  // namespace rwkv::worker
