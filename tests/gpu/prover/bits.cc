#include <cstdint>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/testing/test_engine.h"
#include "tests/gpu/prover/proofs.h"
#include "tests/testing/random_model.h"

namespace rwkv::gpu {
namespace {

using checkpoint::ModelVersion;

// FNV-1a: of bits that are meant to be equal any hash will do.
uint64_t Hash(absl::string_view bytes, uint64_t hash = 14695981039346656037u) {
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211u;
  return hash;
}

struct Case {
  const char* name;
  testing::RandomModelOptions model;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, auto change) {
    Case c = {name, {}};
    c.model.width = 64;
    change(c.model);
    cases.push_back(c);
  };
  using Model = testing::RandomModelOptions;
  add("v4", [](Model& m) { m.version = ModelVersion::k4; });
  add("v5_2", [](Model& m) { m.version = ModelVersion::k5_2; });
  add("v6", [](Model& m) { m.version = ModelVersion::k6; });
  add("v7", [](Model& m) {});
  add("v7_head_64", [](Model& m) { m.width = 128, m.head_size = 64; });
  add("v7_odd", [](Model& m) { m.width = 51, m.head_size = 17, m.decay_rank = 5, m.gate_rank = 7; });
  add("v7_fp32", [](Model& m) { m.dtype = kernels::DType::kFloat32; });
  add("v7_fp16", [](Model& m) { m.dtype = kernels::DType::kFloat16; });
  add("v7a", [](Model& m) { m.version = ModelVersion::k7a; });
  add("v7b", [](Model& m) { m.version = ModelVersion::k7b; });
  return cases;
}

// Logits of a prompt, of a batch's steps behind it, and the state after.
absl::StatusOr<uint64_t> HashOf(const std::string& device, const std::string& path) {
  worker::TestEngineOptions options;
  options.device = device;
  options.slots = 3;
  options.max_batch_tokens = 16;
  worker::EnginePipeline engine(path, 1, options);
  uint64_t hash = Hash("");
  for (int slot = 0; slot < 3; ++slot) {
    RWKV_RETURN_IF_ERROR(engine.AttachFresh(slot, slot + 1));
    std::vector<uint32_t> prompt;
    for (int t = 0; t < 5 + 3 * slot; ++t) prompt.push_back(static_cast<uint32_t>(t * t + 11 * slot + 3) % 101);
    RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, engine.Feed(slot, slot + 1, 0, prompt));
    hash = Hash(worker::LogitsOf(output, slot + 1), hash);
  }
  for (int t = 0; t < 4; ++t) {
    v1::Step step;
    for (int slot = 0; slot < 3; ++slot) {
      *step.add_entries() = worker::Entry(slot, slot + 1, 5 + 3 * slot + t, {static_cast<uint32_t>(7 * t + slot)});
    }
    RWKV_ASSIGN_OR_RETURN(const worker::StepOutput output, engine.Step(std::move(step)));
    for (int slot = 0; slot < 3; ++slot) hash = Hash(worker::LogitsOf(output, slot + 1), hash);
  }
  RWKV_ASSIGN_OR_RETURN(const std::vector<std::string> records, engine.CopyState(1, 2, 12));
  for (const std::string& record : records) hash = Hash(record, hash);
  return hash;
}

}  // namespace

absl::Status Bits(const std::string& device, const std::string& folder, const std::string& expected) {
  std::string lines;
  for (const Case& c : Cases()) {
    const std::string path = absl::StrCat(folder, "/bits.safetensors");
    RWKV_RETURN_IF_ERROR(testing::WriteRandomModel(c.model, path));
    RWKV_ASSIGN_OR_RETURN(const uint64_t hash, HashOf(device, path));
    absl::StrAppend(&lines, absl::StrFormat("%s %016x\n", c.name, hash));
  }
  std::cout << lines << std::flush;
  if (expected.empty()) return absl::OkStatus();
  std::ifstream file(expected);
  std::stringstream text;
  text << file.rdbuf();
  if (!file || text.str().empty()) return absl::NotFoundError(absl::StrCat(expected, " is not there, or empty"));
  const std::vector<std::string> want = absl::StrSplit(text.str(), '\n');
  const std::vector<std::string> got = absl::StrSplit(lines, '\n');
  if (want == got) return absl::OkStatus();
  std::string others;
  for (size_t i = 0; i < got.size(); ++i) {
    if (i >= want.size() || got[i] != want[i]) absl::StrAppend(&others, " ", got[i].substr(0, got[i].find(' ')));
  }
  return absl::InternalError(absl::StrCat("other bits:", others, ", than in ", expected));
}

}  // namespace rwkv::gpu
