// Which kernels a step launches, as JSON lines on standard output: an RWKV-7 of 2 and of 3 layers, 1 row and 16, on the
// emulated GPU. What a layer costs is the difference.
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"

namespace rwkv::worker {
namespace {

absl::Status Count(const std::string& folder, int layers, int rows) {
  testing::RandomModelOptions model;
  model.layers = layers;
  model.width = 128;
  model.head_size = 64;
  const std::string path = absl::StrCat(folder, "/launches.safetensors");
  RWKV_RETURN_IF_ERROR(testing::WriteRandomModel(model, path));
  TestEngineOptions options;
  options.slots = rows;
  options.device = std::string(kernels::cuda::kEmulatedDevice);
  EnginePipeline engine(path, 1, options);
  v1::Step step;
  for (int row = 0; row < rows; ++row) {
    RWKV_RETURN_IF_ERROR(engine.AttachFresh(row, row + 1));
    *step.add_entries() = Entry(row, row + 1, 0, {7}, false, true);
  }
  kernels::cuda::TakeLaunchesOfFake();
  RWKV_RETURN_IF_ERROR(engine.Step(step).status());
  for (const kernels::cuda::FakeLaunch& launch : kernels::cuda::TakeLaunchesOfFake()) {
    std::cout << "{\"layers\": " << layers << ", \"rows\": " << rows << ", \"kernel\": \"" << launch.name
              << "\", \"threads\": " << launch.shape.threads << ", \"shared\": " << launch.shape.shared_bytes << "}\n";
  }
  return absl::OkStatus();
}

absl::Status Run(const std::string& folder) {
  for (const int layers : {2, 3}) {
    for (const int rows : {1, 16}) RWKV_RETURN_IF_ERROR(Count(folder, layers, rows));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace rwkv::worker

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: launches FOLDER, for a small model that is written there\n";
    return 2;
  }
  const absl::Status status = rwkv::worker::Run(argv[1]);
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}
