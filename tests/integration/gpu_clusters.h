// Clusters whose workers compute on emulated GPUs and pass rows by a fake NCCL. What the fakes see that must not be done
// ends a worker badly, and with it the test.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/generation.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/router/client/router_client.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"

namespace rwkv {

using Tokens = std::vector<uint32_t>;

// A small model's file, written when it is asked for first.
inline std::string GpuModelPath(checkpoint::ModelVersion version = checkpoint::ModelVersion::k7) {
  testing::RandomModelOptions options;
  options.version = version;
  options.layers = 3;
  options.width = 32;
  options.head_size = 16;
  const std::string path = absl::StrCat(::testing::TempDir(), "/gpu-", checkpoint::Name(version), ".safetensors");
  static auto* const written = new std::vector<std::string>;
  for (const std::string& one : *written) {
    if (one == path) return path;
  }
  if (absl::Status status = testing::WriteRandomModel(options, path); !status.ok()) ADD_FAILURE() << status;
  written->push_back(path);
  return path;
}

inline Tokens Prompt(size_t size, uint32_t seed = 1) {
  Tokens prompt;
  for (uint32_t i = 0; i < size; ++i) prompt.push_back((i * i + 7 * i + seed) % 101);
  return prompt;
}

inline testing::LocalCluster::Options Gpus(int stages,
                                           checkpoint::ModelVersion version = checkpoint::ModelVersion::k7) {
  testing::LocalCluster::Options options;
  options.model = GpuModelPath(version);
  options.stages = stages;
  options.worker_binary = "services/worker/testing/emulated_worker";
  options.worker_flags = {"--device=cuda/emulated", "--max_batch_tokens=8"};
  if (stages > 1) options.worker_flags.push_back("--link=nccl");
  return options;
}

inline absl::StatusOr<Tokens> Generate(
    router::RouterClient& client, const Tokens& prompt, uint32_t max_tokens,
    const std::function<void(size_t)>& on_token = [](size_t) {}) {
  v1::GenerateRequest request;
  request.mutable_tokens()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_tokens(max_tokens);
  Tokens tokens;
  RWKV_RETURN_IF_ERROR(client.Generate(request, [&](const v1::GenerateResponse& response) -> absl::Status {
    if (!response.has_token_id()) return absl::OkStatus();
    if (response.index() != tokens.size()) {
      return absl::DataLossError(absl::StrCat("index ", response.index(), " after ", tokens.size(), " tokens"));
    }
    tokens.push_back(response.token_id());
    on_token(tokens.size());
    return absl::OkStatus();
  }));
  return tokens;
}

inline absl::StatusOr<Tokens> Generate(const testing::LocalCluster& cluster, const Tokens& prompt,
                                       uint32_t max_tokens) {
  return Generate(*router::MakeRouterClient(cluster.Channel("router-0")), prompt, max_tokens);
}

}  // namespace rwkv
