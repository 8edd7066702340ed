// The worker, which also knows the device "cuda/emulated" and whose NCCL is the fake one: for tests of whole clusters.
// At SIGUSR1 the device's memory breaks at the next call of its runtime, at SIGUSR2 in the next copy.
// What either fake sees that must not be done makes it end badly, also after a drain that went well.
#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "kernels/base/device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "kernels/dispatch/open_device.h"
#include "services/common/logging.h"
#include "services/common/main_loop.h"
#include "services/worker/link/nccl.h"
#include "services/worker/link/testing/fake_nccl.h"
#include "services/worker/worker.h"
#include "services/worker/worker_flags.h"

ABSL_FLAG(std::string, fake_nccl, "", "Faults of the fake NCCL: services/worker/link/testing/fake_nccl.h.");
ABSL_FLAG(std::string, fake_cublaslt, "", "Faults of the fake cuBLASLt: kernels/cuda/testing/fake_cublaslt.h.");
ABSL_FLAG(int64_t, hang_launch, -1, "The kernel, counted from the start, that never ends.");
ABSL_FLAG(int64_t, fail_launch, -1, "The kernel, counted from the start, that faults.");
ABSL_FLAG(bool, eager, false, "Streams run what they are given at once.");
ABSL_FLAG(absl::Duration, hang_limit, absl::Seconds(60), "After what time the emulated GPU is said to hang.");

namespace rwkv::worker {
namespace {

absl::StatusOr<std::unique_ptr<kernels::Device>> OpenDevice(const std::string& name, int threads) {
  if (!kernels::cuda::IsEmulatedDevice(name)) return kernels::OpenDevice(name, threads);
  return kernels::cuda::OpenEmulatedDevice(name, absl::GetFlag(FLAGS_hang_limit));
}

void OnSignal(int signal) {
  kernels::cuda::BreakMemory(signal == SIGUSR1 ? kernels::cuda::Moment::kNextCall : kernels::cuda::Moment::kNextCopy);
}

absl::Status Run() {
  const Worker::Options options = OptionsOfFlags();
  common::InitLogging(options.name);
  RWKV_ASSIGN_OR_RETURN(const nccl::FakeFaults faults, nccl::ParseFakeFaults(absl::GetFlag(FLAGS_fake_nccl)));
  nccl::ResetFake(faults);
  RWKV_ASSIGN_OR_RETURN(const kernels::cuda::cublaslt::FakeFaults library_faults,
                        kernels::cuda::cublaslt::ParseFakeFaults(absl::GetFlag(FLAGS_fake_cublaslt)));
  kernels::cuda::cublaslt::ResetFake(library_faults);
  kernels::cuda::FakeFaults cuda_faults;
  cuda_faults.hang_launch = absl::GetFlag(FLAGS_hang_launch);
  cuda_faults.fail_launch = absl::GetFlag(FLAGS_fail_launch);
  kernels::cuda::ResetFake(cuda_faults);
  kernels::cuda::SetEager(absl::GetFlag(FLAGS_eager));
  signal(SIGUSR1, OnSignal);
  signal(SIGUSR2, OnSignal);

  Worker::Platform platform;
  platform.open_device = OpenDevice;
  platform.load_nccl = []() -> absl::StatusOr<nccl::Nccl> { return nccl::kFakeNccl; };
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<Worker> worker, Worker::Start(options, platform));
  RWKV_RETURN_IF_ERROR(worker->ServeUntilSignal());
  worker.reset();

  std::vector<std::string> violations = kernels::cuda::ViolationsOfFake();
  for (std::string& violation : nccl::ViolationsOfFake()) violations.push_back(std::move(violation));
  if (nccl::CommunicatorsOfFake() > 0) {
    violations.push_back(absl::StrCat(nccl::CommunicatorsOfFake(), " communicators are left"));
  }
  common::LogInfo("fakes", {{"launches", kernels::cuda::CountsOfFake().launches},
                            {"library_products", kernels::cuda::cublaslt::CountsOfFake().matmuls},
                            {"nccl_transfers", nccl::TransfersOfFake()},
                            {"violations", static_cast<int>(violations.size())}});
  if (violations.empty()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the fakes saw: ", absl::StrJoin(violations, "; ")));
}

}  // namespace
}  // namespace rwkv::worker

int main(int argc, char** argv) {
  return rwkv::common::RunMain(argc, argv, "A worker on an emulated GPU, for tests.", rwkv::worker::Run);
}
