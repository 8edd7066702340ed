// What a worker takes to load its layers: at most their bytes in the file and a tenth, in every format. Peak resident
// sizes of real processes, less that of one with a model of a few kilobytes.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_tensors.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::rwkv::checkpoint::ModelVersion;
using ::rwkv::kernels::BlockType;
using ::rwkv::testing::GgmlTensor;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::RawTensor;

constexpr int kLayers = 6;
constexpr int64_t kWidth = 512;
constexpr int64_t kVocabulary = 8192;

// What else grows with a model: activations of the warm-up, one state, the directory, pages mapped around a tensor's
// ends. A state pool, a head in fp32 or a second copy of the weights is many times that.
constexpr int64_t kBesidesBytes = 3 << 20;

struct Written {
  std::string path;
  std::vector<std::pair<std::string, int64_t>> bytes;  // By original name.
};

struct Case {
  std::string name;
  ModelVersion version = ModelVersion::k7;
  absl::StatusOr<Written> (*write)(const Case& c) = nullptr;
  BlockType blocks = BlockType::kNone;  // ggml's files: of the matrices; none is fp16.
  uint32_t ggml_type = 1;               // The same, as the file says it.
};

testing::RandomModelOptions OptionsOf(ModelVersion version) {
  testing::RandomModelOptions options;
  options.version = version;
  options.layers = kLayers;
  options.width = kWidth;
  options.head_size = 64;
  options.vocab_size = kVocabulary;
  return options;
}

std::string PathOf(const Case& c) { return absl::StrCat(std::getenv("TEST_TMPDIR"), "/", c.name); }

absl::StatusOr<Written> WriteTensors(const Case& c, std::string (*encode)(absl::Span<const RawTensor>)) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> tensors, testing::MakeRandomModel(OptionsOf(c.version)));
  Written written{PathOf(c), {}};
  for (const RawTensor& tensor : tensors) {
    written.bytes.emplace_back(tensor.spec.name, static_cast<int64_t>(tensor.data.size()));
  }
  RWKV_RETURN_IF_ERROR(testing::WriteFileAtomically(written.path, encode(tensors)));
  return written;
}

absl::StatusOr<Written> WriteSafetensors(const Case& c) {
  return WriteTensors(c, [](absl::Span<const RawTensor> tensors) { return testing::SafetensorsBytes(tensors); });
}
absl::StatusOr<Written> WriteTorchZip(const Case& c) { return WriteTensors(c, testing::TorchZipBytes); }
absl::StatusOr<Written> WriteTorchLegacy(const Case& c) { return WriteTensors(c, testing::TorchLegacyBytes); }

// "att.w1" and the like, which ggml's files hold as [out, in].
bool IsFactor(absl::string_view rest) {
  return absl::ConsumePrefix(&rest, "att.") && rest.size() == 2 && absl::StrContains("wavg", rest.substr(0, 1)) &&
         (rest[1] == '1' || rest[1] == '2');
}

// A tensor of `original`'s shape as ggml's files have it: matrices as the case says, others fp32. Zeros, which take no
// less memory than other weights.
GgmlTensor AsGgml(const Case& c, const RawTensor& original, absl::string_view rest) {
  GgmlTensor tensor;
  int64_t elements = 1;
  for (int64_t size : original.spec.shape) {
    elements *= size;
    if (size != 1) tensor.shape.push_back(size);
  }
  tensor.name = original.spec.name;
  if (IsFactor(rest)) std::swap(tensor.shape[0], tensor.shape[1]);
  if (tensor.shape.size() != 2 || !absl::EndsWith(tensor.name, ".weight")) {
    tensor.data.assign(elements * 4, '\0');
    return tensor;
  }
  tensor.type = c.ggml_type;
  tensor.data.assign(c.blocks == BlockType::kNone
                         ? elements * 2
                         : elements / kernels::BlockWeights(c.blocks) * kernels::BlockBytes(c.blocks),
                     '\0');
  return tensor;
}

// llama.cpp's name of a layer's tensor.
std::string GgufName(absl::string_view rest) {
  constexpr std::pair<absl::string_view, absl::string_view> kParts[] = {
      {"ln1", "attn_norm"},        {"ln2", "attn_norm_2"},
      {"att.ln_x", "time_mix_ln"}, {"ffn.x_k", "channel_mix_lerp_k.weight"},
      {"ffn.", "channel_mix_"},    {"att.", "time_mix_"},
  };
  for (const auto& [original, gguf] : kParts) {
    if (!absl::ConsumePrefix(&rest, original)) continue;
    const bool has_end = absl::EndsWith(rest, ".weight") || absl::EndsWith(rest, ".bias") || rest.empty();
    return absl::StrCat(gguf, rest, has_end ? "" : ".weight");
  }
  return std::string(rest);
}

absl::StatusOr<Written> WriteGguf(const Case& c) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> originals, testing::MakeRandomModel(OptionsOf(c.version)));
  constexpr std::pair<absl::string_view, absl::string_view> kGlobal[] = {
      {"emb.weight", "token_embd.weight"},           {"blocks.0.ln0.weight", "token_embd_norm.weight"},
      {"blocks.0.ln0.bias", "token_embd_norm.bias"}, {"ln_out.weight", "output_norm.weight"},
      {"ln_out.bias", "output_norm.bias"},           {"head.weight", "output.weight"},
  };
  Written written{PathOf(c), {}};
  std::vector<GgmlTensor> tensors;
  for (const RawTensor& original : originals) {
    absl::string_view rest = original.spec.name;
    const bool is_layers = absl::ConsumePrefix(&rest, "blocks.");
    const std::string layer(rest.substr(0, rest.find('.')));
    if (is_layers) rest.remove_prefix(layer.size() + 1);
    if (absl::StartsWith(rest, "att.x_") && rest != "att.x_r") continue;  // One tensor holds the six.
    GgmlTensor tensor = AsGgml(c, original, rest);
    tensor.name = absl::StrCat("blk.", layer, ".", GgufName(rest));
    for (const auto& [name, gguf] : kGlobal) {
      if (name == original.spec.name) tensor.name = std::string(gguf);
    }
    if (rest == "att.x_r") {
      tensor.name = absl::StrCat("blk.", layer, ".time_mix_lerp_fused.weight");
      tensor.shape = {6, 1, 1, kWidth};
      tensor.data.assign(6 * kWidth * 4, '\0');
    }
    if (rest == "att.r_k") tensor.shape = {kWidth};
    written.bytes.emplace_back(original.spec.name, static_cast<int64_t>(tensor.data.size()));
    tensors.push_back(std::move(tensor));
  }
  const std::vector<testing::GgufKey> keys = {testing::GgufText("general.architecture", "rwkv7"),
                                              testing::GgufUint32("rwkv7.wkv.head_size", 64)};
  RWKV_RETURN_IF_ERROR(testing::WriteFileAtomically(written.path, testing::GgufBytes(keys, tensors)));
  return written;
}

// Of RWKV-4, whose converter changes least.
absl::StatusOr<Written> WriteRwkvCpp(const Case& c) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> originals, testing::MakeRandomModel(OptionsOf(c.version)));
  Written written{PathOf(c), {}};
  std::vector<GgmlTensor> tensors;
  for (const RawTensor& original : originals) {
    GgmlTensor tensor = AsGgml(c, original, "");
    if (absl::EndsWith(tensor.name, ".time_decay")) {  // -exp(0)
      tensor.data.clear();
      for (int64_t i = 0; i < kWidth; ++i) tensor.data.append("\0\0\x80\xbf", 4);
    }
    written.bytes.emplace_back(tensor.name, static_cast<int64_t>(tensor.data.size()));
    tensors.push_back(std::move(tensor));
  }
  const testing::RwkvCppHeader header = {101, static_cast<uint32_t>(kVocabulary), static_cast<uint32_t>(kWidth),
                                         kLayers};
  RWKV_RETURN_IF_ERROR(testing::WriteFileAtomically(written.path, testing::RwkvCppBytes(header, tensors)));
  return written;
}

// Bytes in the file of what the stage computes with.
int64_t Share(const Written& written, int stage, int stages) {
  int64_t share = 0;
  for (const auto& [name, bytes] : written.bytes) {
    absl::string_view rest = name;
    int owner = absl::StartsWith(name, "emb.") ? 0 : stages - 1;
    int layer = 0;
    if (absl::ConsumePrefix(&rest, "blocks.") && absl::SimpleAtoi(rest.substr(0, rest.find('.')), &layer)) {
      owner = layer / (kLayers / stages);
    }
    if (owner == stage) share += bytes;
  }
  return share;
}

// The largest resident size that a process has had.
int64_t PeakBytes(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  int64_t kilobytes = 0;
  for (std::string line; std::getline(status, line);) {
    absl::string_view rest = line;
    if (!absl::ConsumePrefix(&rest, "VmHWM:") || !absl::ConsumeSuffix(&rest, "kB")) continue;
    EXPECT_TRUE(absl::SimpleAtoi(rest, &kilobytes)) << line;
  }
  EXPECT_GT(kilobytes, 0);
  return kilobytes << 10;
}

absl::StatusOr<std::vector<int64_t>> PeaksOfWorkers(const std::string& model, int stages) {
  LocalCluster::Options options;
  options.model = model;
  options.stages = stages;
  // Without the wait for the pipeline: the router would ask for a vocabulary, and workers listen once they have loaded.
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<LocalCluster> cluster, LocalCluster::StartWithoutWaiting(options));
  std::vector<int64_t> peaks;
  for (int stage = 0; stage < stages; ++stage) {
    peaks.push_back(PeakBytes(cluster->pid(absl::StrCat("worker-", stage))));
  }
  return peaks;
}

class LoadMemoryTest : public ::testing::TestWithParam<Case> {};

TEST_P(LoadMemoryTest, IsTheStagesShareOfTheFile) {
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
  GTEST_SKIP() << "a sanitizer's shadow memory is most of what is resident";
#endif
#endif
  const std::string tiny = absl::StrCat(std::getenv("TEST_TMPDIR"), "/tiny.safetensors");
  ASSERT_OK(testing::WriteRandomModel(testing::RandomModelOptions(), tiny));
  ASSERT_OK_AND_ASSIGN(const Written written, GetParam().write(GetParam()));
  for (int stages : {1, 2}) {
    ASSERT_OK_AND_ASSIGN(const std::vector<int64_t> base, PeaksOfWorkers(tiny, stages));
    ASSERT_OK_AND_ASSIGN(const std::vector<int64_t> peaks, PeaksOfWorkers(written.path, stages));
    for (int stage = 0; stage < stages; ++stage) {
      const int64_t share = Share(written, stage, stages);
      EXPECT_LE(peaks[stage] - base[stage], share + share / 10 + kBesidesBytes)
          << "stage " << stage << " of " << stages << ", whose share is " << share;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, LoadMemoryTest,
                         ::testing::Values(Case{"safetensors", ModelVersion::k7, WriteSafetensors},
                                           Case{"safetensors_6", ModelVersion::k6, WriteSafetensors},
                                           Case{"pth", ModelVersion::k7, WriteTorchZip},
                                           Case{"pth_legacy", ModelVersion::k5_2, WriteTorchLegacy},
                                           Case{"gguf_F16", ModelVersion::k7, WriteGguf},
                                           Case{"gguf_Q8_0", ModelVersion::k7, WriteGguf, BlockType::kQ8_0, 8},
                                           Case{"gguf_Q4_0", ModelVersion::k7, WriteGguf, BlockType::kQ4_0, 2},
                                           Case{"gguf_Q4_K", ModelVersion::k7, WriteGguf, BlockType::kQ4_K, 12},
                                           Case{"gguf_Q6_K", ModelVersion::k7, WriteGguf, BlockType::kQ6_K, 14},
                                           Case{"rwkv_cpp_FP16", ModelVersion::k4, WriteRwkvCpp},
                                           Case{"rwkv_cpp_Q5_1", ModelVersion::k4, WriteRwkvCpp, BlockType::kQ5_1, 8}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace rwkv
