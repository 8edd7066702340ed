// prover: what only a device can show, one proof a call, for ../prove.sh.
//
//   prover rates DEVICE                      copy bandwidth and matrix rate
//   prover probes DEVICE                     every primitive of device.cuh against the emulation
//   prover bits DEVICE FOLDER [FILE]         hashes of what small models compute; FILE: those expected
//   prover graphs DEVICE FOLDER              decode steps as graphs and as launches
//   prover layers DEVICE FOLDER WIDTH        a layer of a real model's width against this machine's CPU
//   prover op_times DEVICE WIDTH ROWS SECS   each operation of a layer
//   prover library DEVICE                    what cuBLASLt chooses, and its rate
//   prover epochs DEVICE FOLDER N            saves beside a running batch, memory after N epochs
//   prover pair DEVICE                       rows between two processes by NCCL, with deaths and silences
//
// DEVICE: cuda:N, or for a rehearsal cuda/emulated. FOLDER: for small models that are written there.
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"

namespace rwkv::gpu {
namespace {

absl::Status Run(const std::vector<std::string>& arguments, bool& understood) {
  const size_t count = arguments.size();
  understood = true;
  if (count < 3) return absl::OkStatus();
  const std::string& proof = arguments[1];
  const std::string& device = arguments[2];
  if (proof == "rates" && count == 3) return Rates(device);
  if (proof == "probes" && count == 3) return Probes(device);
  if (proof == "bits" && (count == 4 || count == 5)) return Bits(device, arguments[3], count == 5 ? arguments[4] : "");
  if (proof == "graphs" && count == 4) return Graphs(device, arguments[3]);
  if (proof == "library" && count == 3) return Library(device);
  int64_t width = 0;
  int64_t rows = 0;
  double seconds = 0;
  if (proof == "op_times" && count == 6 && absl::SimpleAtoi(arguments[3], &width) &&
      absl::SimpleAtoi(arguments[4], &rows) && absl::SimpleAtod(arguments[5], &seconds)) {
    return OpTimes(device, width, rows, seconds);
  }
  if (proof == "layers" && count == 5 && absl::SimpleAtoi(arguments[4], &width)) {
    return Layers(device, arguments[3], width);
  }
  int epochs = 0;
  if (proof == "epochs" && count == 5 && absl::SimpleAtoi(arguments[4], &epochs)) {
    return Epochs(device, arguments[3], epochs);
  }
  if (proof == "pair" && count == 3) return Pair(device, arguments[0]);
  if (proof == "pair_end" && count == 4) return PairEnd(device, arguments[3]);
  understood = false;
  return absl::OkStatus();
}

}  // namespace
}  // namespace rwkv::gpu

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv, argv + argc);
  bool understood = argc >= 3;
  absl::Status status;
  if (understood) status = rwkv::gpu::Run(arguments, understood);
  if (!understood) {
    std::cerr << "usage: prover rates|probes|bits|graphs|layers|op_times|library|epochs|pair DEVICE ...: see "
                 "tests/gpu/prover/prover.cc\n";
    return 2;
  }
  if (status.ok()) status = rwkv::gpu::CheckViolations(argv[2]);
  if (!status.ok()) std::cerr << "prover: " << status << std::endl;
  return status.ok() ? 0 : 1;
}
