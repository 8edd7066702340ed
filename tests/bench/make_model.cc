// make_model SHAPE OUT.safetensors: random weights in bf16 at the shape of a published RWKV-7. Speed does not depend on
// what they say, but for the zeros of the squared ReLU, of which random models have about half, and trained ones more:
// SHAPE-sparse has 85 %.
#include <cstdint>
#include <iostream>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "tests/testing/random_model.h"

namespace rwkv {
namespace {

struct Shape {
  absl::string_view name;
  int layers;
  int64_t width;
  int64_t vocab_size;
  // Ranks of the decay, the in-context learning rate, the value residual and the gate.
  int64_t decay_rank, iclr_rank, value_residual_rank, gate_rank;
};

// Of BlinkDL's g1 models; "tiny" is for tests of the bench itself.
constexpr Shape kShapes[] = {
    {"tiny", 2, 128, 512, 32, 32, 32, 32},      {"0.1b", 12, 768, 65536, 64, 64, 32, 128},
    {"0.4b", 24, 1024, 65536, 64, 64, 32, 128}, {"1.5b", 24, 2048, 65536, 96, 96, 64, 256},
    {"2.9b", 32, 2560, 65536, 96, 96, 64, 320}, {"7.2b", 32, 4096, 65536, 128, 128, 96, 480},
};

// Of ffn.key's products, whose inputs are about 1 on average and about 1 beside that, so that 15 % stay above zero.
constexpr double kSparseShift = 1.4;

int Main(int argc, char** argv) {
  if (argc == 3) {
    absl::string_view name = argv[1];
    const bool sparse = absl::ConsumeSuffix(&name, "-sparse");
    for (const Shape& shape : kShapes) {
      if (shape.name != name) continue;
      testing::RandomModelOptions options;
      if (sparse) options.key_shift = kSparseShift;
      options.layers = shape.layers;
      options.width = shape.width;
      options.head_size = 64;
      options.vocab_size = shape.vocab_size;
      options.decay_rank = shape.decay_rank;
      options.iclr_rank = shape.iclr_rank;
      options.value_residual_rank = shape.value_residual_rank;
      options.gate_rank = shape.gate_rank;
      const absl::Status status = testing::WriteRandomModel(options, argv[2]);
      if (!status.ok()) std::cerr << argv[2] << ": " << status << std::endl;
      return status.ok() ? 0 : 1;
    }
  }
  std::cerr << "usage: make_model SHAPE[-sparse] OUT.safetensors; shapes:";
  for (const Shape& shape : kShapes) std::cerr << " " << shape.name;
  std::cerr << std::endl;
  return 2;
}

}  // namespace
}  // namespace rwkv

int main(int argc, char** argv) { return rwkv::Main(argc, argv); }
