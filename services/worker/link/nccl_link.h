// Device links over NCCL: a communicator of two for each pair of neighbours and each epoch, so that a failure and its
// repair concern two workers. Nothing here waits for ever: communicators are non-blocking, and every wait has a limit.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/nccl.h"

namespace rwkv::worker {

struct NcclLimits {
  absl::Duration init = absl::Seconds(60);   // Until both ends of a pair are there.
  absl::Duration call = absl::Seconds(30);   // Until NCCL has taken a transfer; the first makes the connection.
  absl::Duration abort = absl::Seconds(10);  // Until an aborted communicator is gone.
};

// `nccl` outlives it. `device` is the identity of the device whose streams Move() gets, and `bind` makes it the calling
// thread's. kUnimplemented: the library is too old. kInternal: it does not say its version.
absl::StatusOr<std::unique_ptr<DeviceLinks>> MakeNcclLinks(const nccl::Nccl& nccl, const std::string& device,
                                                           std::function<absl::Status()> bind,
                                                           const NcclLimits& limits = {});

}  // namespace rwkv::worker
