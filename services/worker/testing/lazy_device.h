// An asynchronous device at its laziest: what is enqueued runs when somebody waits for it, and not before.
#pragma once

#include <memory>

#include "kernels/base/device.h"
#include "services/worker/model/block/stage_model.h"

namespace rwkv::worker {

// `device` computes at once. Operations of the model must go through the model's twin below: their arguments may lie on
// the caller's stack.
std::unique_ptr<kernels::Device> MakeLazy(std::unique_ptr<kernels::Device> device);

// `model`, whose Forward() is put on such a device's stream as a whole.
std::unique_ptr<StageModel> MakeLazy(std::unique_ptr<StageModel> model);

}  // namespace rwkv::worker
