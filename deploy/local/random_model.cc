// Writes a random RWKV-7 model, for a first start without a real one. What it says is nonsense.
#include "tests/testing/random_model.h"

#include <iostream>
#include <string>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"

// The defaults make about 37 MB: the World vocabulary's embedding and head, and little between.
ABSL_FLAG(std::string, out, "", "File to write, .safetensors. Required.");
ABSL_FLAG(int, layers, 6, "Layers.");
ABSL_FLAG(int64_t, width, 128, "Embedding width.");
ABSL_FLAG(int64_t, head_size, 64, "Channels per head; divides the width.");
ABSL_FLAG(int64_t, ffn_width, 0, "Hidden width of the channel mix; 0: four times the width.");
ABSL_FLAG(int64_t, vocab, 65536, "Vocabulary size; 65536 is the World tokenizer's.");
ABSL_FLAG(std::string, dtype, "bf16", "Type of the weights: fp32, bf16 or fp16.");
ABSL_FLAG(uint64_t, seed, 1, "Equal seeds and sizes give equal files.");

namespace rwkv {
namespace {

absl::Status Run() {
  const std::string out = absl::GetFlag(FLAGS_out);
  if (out.empty()) return absl::InvalidArgumentError("--out is required");
  testing::RandomModelOptions options;
  RWKV_ASSIGN_OR_RETURN(options.dtype, kernels::ParseDType(absl::GetFlag(FLAGS_dtype)));
  options.layers = absl::GetFlag(FLAGS_layers);
  options.width = absl::GetFlag(FLAGS_width);
  options.head_size = absl::GetFlag(FLAGS_head_size);
  options.ffn_width = absl::GetFlag(FLAGS_ffn_width);
  options.vocab_size = absl::GetFlag(FLAGS_vocab);
  options.seed = absl::GetFlag(FLAGS_seed);
  return testing::WriteRandomModel(options, out);
}

}  // namespace
}  // namespace rwkv

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("random_model --out FILE.safetensors [--layers N --width N ...]");
  absl::ParseCommandLine(argc, argv);
  if (const absl::Status status = rwkv::Run(); !status.ok()) {
    std::cerr << "random_model: " << status << "\n";
    return 1;
  }
  return 0;
}
