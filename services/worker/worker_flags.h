// The worker's command line.
#pragma once

#include "services/worker/worker.h"

namespace rwkv::worker {

// What the flags say, which whoever links this has.
Worker::Options OptionsOfFlags();

}  // namespace rwkv::worker
