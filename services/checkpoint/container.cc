#include "services/checkpoint/container.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/gguf_dialect.h"
#include "services/checkpoint/dialects/hugging_face_dialect.h"
#include "services/checkpoint/dialects/rwkv_cpp_dialect.h"
#include "services/checkpoint/dialects/views.h"
#include "services/checkpoint/dialects/web_rwkv_dialect.h"
#include "services/checkpoint/formats/gguf.h"
#include "services/checkpoint/formats/inflated_zip.h"
#include "services/checkpoint/formats/rwkv_cpp.h"
#include "services/checkpoint/formats/safetensors.h"
#include "services/checkpoint/formats/torch_file.h"

namespace rwkv::checkpoint {
namespace {

// What wrappers of PyTorch and its trainers put before a model's own names: DataParallel, Lightning, PEFT.
constexpr absl::string_view kPrefixes[] = {"base_model.", "model.", "module."};
// And before those of any module, so at any place: torch.compile, DeepSpeed, FSDP, activation checkpointing.
constexpr absl::string_view kWrappers[] = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module",
                                           "_checkpoint_wrapped_module"};

std::string WithoutTrainerNames(absl::string_view name) {
  std::vector<absl::string_view> parts = absl::StrSplit(name, '.');
  parts.erase(std::remove_if(parts.begin(), parts.end(),
                             [](absl::string_view part) {
                               return std::find(std::begin(kWrappers), std::end(kWrappers), part) !=
                                      std::end(kWrappers);
                             }),
              parts.end());
  const std::string joined = absl::StrJoin(parts, ".");
  absl::string_view rest = joined;
  while (std::any_of(std::begin(kPrefixes), std::end(kPrefixes),
                     [&rest](absl::string_view prefix) { return absl::ConsumePrefix(&rest, prefix); })) {
  }
  return std::string(rest);
}

bool StartsWith(absl::Span<const uint8_t> bytes, absl::string_view text) {
  return bytes.size() >= text.size() && std::memcmp(bytes.data(), text.data(), text.size()) == 0;
}

// Files of PyTorch's world: any of the naming schemes.
absl::Status NamesToOriginal(Container* container) {
  for (TensorRecord& record : container->records) record.name = WithoutTrainerNames(record.name);
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

void TakeOver(TorchDirectory directory, Container* container) {
  container->records = std::move(directory.tensors);
  if (directory.skipped.empty()) return;
  for (std::string& name : directory.skipped) name = Quoted(name);
  container->notes.push_back(
      absl::StrCat("objects beside the tensors were skipped, of ", absl::StrJoin(directory.skipped, ", ")));
}

// Weights in double precision, which no kernel computes with, are read as the nearest floats.
void NarrowDoubles(Container* container) {
  int64_t count = 0;
  for (TensorRecord& record : container->records) {
    if (record.type != ElementType::kFloat64) continue;
    record.type = ElementType::kFloat32;
    record.is_stored_double = true;
    ++count;
  }
  if (count > 0) container->notes.push_back(absl::StrCat(count, " tensors of fp64 are read as fp32"));
}

// A model whose head is its embedding is saved without it; transformers calls that tie_word_embeddings.
void TieHead(Container* container) {
  const TensorRecord* embedding = nullptr;
  bool has_layers = false;
  for (const TensorRecord& record : container->records) {
    if (record.name == "head.weight") return;
    if (record.name == "emb.weight") embedding = &record;
    has_layers |= absl::StartsWith(record.name, "blocks.");
  }
  if (embedding == nullptr || !has_layers) return;
  TensorRecord head = *embedding;
  head.name = "head.weight";
  container->records.push_back(std::move(head));
  container->notes.push_back("there is no head.weight: the head is taken to be tied to the embedding");
}

// One file's directory, with the names and layouts that it has. (rwkv.cpp's layouts go by a header of the file's own,
// so they are made original here; nobody cuts those files.)
absl::Status ReadFile(absl::Span<const uint8_t> file, DoneWith done, Container* container) {
  if (StartsWith(file, "GGUF")) {
    container->format = "gguf";
    RWKV_ASSIGN_OR_RETURN(GgufDirectory directory, ReadGguf(file));
    container->records = std::move(directory.tensors);
    container->metadata = std::move(directory.metadata);
    container->tokens = std::move(directory.tokens);
    container->token_types = std::move(directory.token_types);
    return absl::OkStatus();
  }
  if (StartsWith(file, "fmgg")) {
    container->format = "rwkv.cpp";
    RWKV_ASSIGN_OR_RETURN(RwkvCppDirectory directory, ReadRwkvCpp(file, done));
    RWKV_ASSIGN_OR_RETURN(container->records, RwkvCppToOriginal(std::move(directory)));
    return absl::OkStatus();
  }
  if (LooksLikeTorchZip(file)) {
    container->format = "pth";
    RWKV_ASSIGN_OR_RETURN(TorchDirectory directory, ReadTorchZip(file, done));
    TakeOver(std::move(directory), container);
    return absl::OkStatus();
  }
  if (LooksLikeTorchLegacy(file)) {
    container->format = "pth-legacy";
    RWKV_ASSIGN_OR_RETURN(TorchDirectory directory, ReadTorchLegacy(file, done));
    TakeOver(std::move(directory), container);
    return absl::OkStatus();
  }
  container->format = "safetensors";
  RWKV_ASSIGN_OR_RETURN(SafetensorsDirectory directory, ReadSafetensors(file));
  container->records = std::move(directory.tensors);
  container->metadata = std::move(directory.metadata);
  return absl::OkStatus();
}

absl::Status ToOriginal(Container* container) {
  if (container->format == "gguf") {
    RWKV_RETURN_IF_ERROR(GgufToOriginal(container->metadata, &container->records));
    SplitIntoPairs(container);
    return absl::OkStatus();
  }
  if (container->format == "rwkv.cpp") {
    SplitIntoPairs(container);
    return absl::OkStatus();
  }
  return NamesToOriginal(container);
}

// A part of a GGUF says which it is, and of how many.
absl::Status CheckPart(const Container& part, size_t file, size_t files) {
  const auto count = part.metadata.find("split.count");
  if (count == part.metadata.end()) return absl::OkStatus();
  const auto number = part.metadata.find("split.no");
  if (count->second == absl::StrCat(files) && (number == part.metadata.end() || number->second == absl::StrCat(file))) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("is part ", number == part.metadata.end() ? "?" : number->second, " (from 0) of ", count->second,
                   ", but stands for part ", file, " of ", files,
                   "; parts are found beside each other by names that end in -00001-of-0000N.gguf"));
}

absl::Status CheckIndex(const Container& part, const std::set<std::string>& expected) {
  size_t found = 0;
  for (const TensorRecord& record : part.records) {
    if (expected.count(record.name) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("holds tensor ", Quoted(record.name), ", which the index does not name for this file"));
    }
    ++found;
  }
  if (found == expected.size()) return absl::OkStatus();
  for (const std::string& name : expected) {
    if (std::none_of(part.records.begin(), part.records.end(),
                     [&name](const TensorRecord& record) { return record.name == name; })) {
      return absl::InvalidArgumentError(absl::StrCat("does not hold tensor ", Quoted(name), ", as the index says"));
    }
  }
  return absl::OkStatus();
}

// Adds a file's part to those before.
absl::Status AddPart(Container part, size_t file, size_t files, const std::set<std::string>* tensors,
                     Container* container) {
  if (file > 0 && part.format != container->format) {
    return absl::InvalidArgumentError(absl::StrCat("is ", part.format, ", the files before are ", container->format));
  }
  RWKV_RETURN_IF_ERROR(CheckPart(part, file, files));
  if (tensors != nullptr) RWKV_RETURN_IF_ERROR(CheckIndex(part, *tensors));
  for (TensorRecord& record : part.records) record.shard = static_cast<int>(file);
  if (file == 0) {
    *container = std::move(part);
    return absl::OkStatus();
  }
  if (container->records.size() + part.records.size() > kMaxTensors) {
    return absl::InvalidArgumentError(absl::StrCat("makes it more than ", kMaxTensors, " tensors"));
  }
  std::move(part.records.begin(), part.records.end(), std::back_inserter(container->records));
  for (auto& [key, value] : part.metadata) container->metadata.emplace(key, std::move(value));
  std::move(part.notes.begin(), part.notes.end(), std::back_inserter(container->notes));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<MappedFile>> OpenFile(const std::string& path) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  absl::StatusOr<std::unique_ptr<MappedFile>> inflated = InflateZip(std::move(file));
  if (inflated.ok()) return inflated;
  return absl::Status(inflated.status().code(), absl::StrCat(path, ": ", inflated.status().message()));
}

absl::StatusOr<Container> ReadContainer(absl::Span<const uint8_t> file, DoneWith done) {
  return ReadContainer({{file, "", nullptr}}, [done](size_t, uint64_t offset, uint64_t size) { done(offset, size); });
}

absl::StatusOr<Container> ReadContainer(absl::Span<const ContainerFile> files,
                                        absl::FunctionRef<void(size_t file, uint64_t offset, uint64_t size)> done) {
  Container container;
  for (size_t i = 0; i < files.size(); ++i) {
    Container part;
    absl::Status status = ReadFile(
        files[i].bytes, [&](uint64_t offset, uint64_t size) { done(i, offset, size); }, &part);
    if (status.ok()) status = AddPart(std::move(part), i, files.size(), files[i].tensors, &container);
    if (status.ok()) continue;
    if (files.size() == 1) return status;
    return absl::Status(status.code(), absl::StrCat(files[i].path, ": ", status.message()));
  }
  NarrowDoubles(&container);
  RWKV_RETURN_IF_ERROR(ToOriginal(&container));
  TieHead(&container);
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
