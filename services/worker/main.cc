// One pipeline stage as a process.
#include <memory>

#include "absl/status/status.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"
#include "services/common/main_loop.h"
#include "services/common/memory.h"
#include "services/common/security/server_flags.h"
#include "services/worker/link/nccl.h"
#include "services/worker/worker.h"
#include "services/worker/worker_flags.h"

namespace {

absl::Status Run() {
  const rwkv::worker::Worker::Options options = rwkv::worker::OptionsOfFlags();
  rwkv::common::InitLogging(options.name);
  RWKV_RETURN_IF_ERROR(rwkv::common::CheckServerFlags(options.listen, options.metrics_listen, options.drain_timeout));
  rwkv::common::KeepFreedMemory();
  rwkv::worker::nccl::SetEnvironment();
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<rwkv::worker::Worker> worker, rwkv::worker::Worker::Start(options));
  return worker->ServeUntilSignal();
}

}  // namespace

int main(int argc, char** argv) {
  return rwkv::common::RunMain(argc, argv, "Serves one pipeline stage of an RWKV model.", Run);
}
