#include "services/checkpoint/container.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/gguf_dialect.h"
#include "services/checkpoint/dialects/hugging_face_dialect.h"
#include "services/checkpoint/dialects/rwkv_cpp_dialect.h"
#include "services/checkpoint/dialects/views.h"
#include "services/checkpoint/dialects/web_rwkv_dialect.h"
#include "services/checkpoint/formats/gguf.h"
#include "services/checkpoint/formats/rwkv_cpp.h"
#include "services/checkpoint/formats/safetensors.h"
#include "services/checkpoint/formats/torch_file.h"

namespace rwkv::checkpoint {
namespace {

// What PyTorch's and PEFT's wrappers put before a model's own names.
std::string WithoutTrainerPrefix(absl::string_view name) {
  while (absl::ConsumePrefix(&name, "_forward_module.") || absl::ConsumePrefix(&name, "base_model.") ||
         absl::ConsumePrefix(&name, "model.")) {
  }
  return std::string(name);
}

bool StartsWith(absl::Span<const uint8_t> bytes, absl::string_view text) {
  return bytes.size() >= text.size() && std::memcmp(bytes.data(), text.data(), text.size()) == 0;
}

// Files of PyTorch's world: any of the naming schemes.
absl::Status NamesToOriginal(Container* container) {
  for (TensorRecord& record : container->records) record.name = WithoutTrainerPrefix(record.name);
  if (LooksLikeHuggingFace(container->records)) {
    container->dialect = "hugging-face";
    return HuggingFaceToOriginal(&container->records);
  }
  if (LooksLikeWebRwkv(container->records)) {
    container->dialect = "web-rwkv";
    return WebRwkvToOriginal(&container->records);
  }
  return absl::OkStatus();
}

// ggml's blocks of 32 become pairs of quants and scales, which the model's loader finds by this key.
void SplitIntoPairs(Container* container) {
  if (SplitBlocks(&container->records)) container->metadata["quantisation.group"] = "32";
}

absl::Status ReadRecords(absl::Span<const uint8_t> file, DoneWith done, Container* container) {
  if (StartsWith(file, "GGUF")) {
    container->format = "gguf";
    RWKV_ASSIGN_OR_RETURN(GgufDirectory directory, ReadGguf(file));
    container->records = std::move(directory.tensors);
    container->metadata = std::move(directory.metadata);
    container->tokens = std::move(directory.tokens);
    container->token_types = std::move(directory.token_types);
    RWKV_RETURN_IF_ERROR(GgufToOriginal(container->metadata, &container->records));
    SplitIntoPairs(container);
    return absl::OkStatus();
  }
  if (StartsWith(file, "fmgg")) {
    container->format = "rwkv.cpp";
    RWKV_ASSIGN_OR_RETURN(RwkvCppDirectory directory, ReadRwkvCpp(file, done));
    RWKV_ASSIGN_OR_RETURN(container->records, RwkvCppToOriginal(std::move(directory)));
    SplitIntoPairs(container);
    return absl::OkStatus();
  }
  if (LooksLikeTorchZip(file)) {
    container->format = "pth";
    RWKV_ASSIGN_OR_RETURN(container->records, ReadTorchZip(file, done));
    return NamesToOriginal(container);
  }
  if (LooksLikeTorchLegacy(file)) {
    container->format = "pth-legacy";
    RWKV_ASSIGN_OR_RETURN(container->records, ReadTorchLegacy(file, done));
    return NamesToOriginal(container);
  }
  container->format = "safetensors";
  RWKV_ASSIGN_OR_RETURN(SafetensorsDirectory directory, ReadSafetensors(file));
  container->records = std::move(directory.tensors);
  container->metadata = std::move(directory.metadata);
  return NamesToOriginal(container);
}

}  // namespace

absl::StatusOr<Container> ReadContainer(absl::Span<const uint8_t> file, DoneWith done) {
  Container container;
  RWKV_RETURN_IF_ERROR(ReadRecords(file, done, &container));
  std::sort(container.records.begin(), container.records.end(),
            [](const TensorRecord& a, const TensorRecord& b) { return a.name < b.name; });
  for (size_t i = 1; i < container.records.size(); ++i) {
    if (container.records[i].name == container.records[i - 1].name) {
      return absl::InvalidArgumentError(absl::StrCat("two tensors are named ", Quoted(container.records[i].name)));
    }
  }
  return container;
}

}  // namespace rwkv::checkpoint
