// Writes checkpoint files in the formats the worker reads.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::testing {

struct TensorSpec {
  std::string name;
  checkpoint::ElementType type = checkpoint::ElementType::kFloat32;
  std::vector<int64_t> shape;
};

// The tensor's elements, row-major, little-endian.
struct RawTensor {
  TensorSpec spec;
  std::string data;
};

int64_t ElementsOf(const TensorSpec& spec);

// As Hugging Face's safetensors writes it: JSON without blanks, padded with blanks to eight bytes.
std::string SafetensorsBytes(absl::Span<const RawTensor> tensors,
                             const std::map<std::string, std::string>& metadata = {});
// The length and the JSON, for those who write the data themselves: tensors in this order, without gaps.
std::string SafetensorsHeader(absl::Span<const TensorSpec> tensors,
                              const std::map<std::string, std::string>& metadata = {});

// As torch.save: a zip archive, stored, with ZIP64 records and data descriptors, payloads aligned to 64 bytes.
std::string TorchZipBytes(absl::Span<const RawTensor> tensors);
// As torch.save(..., _use_new_zipfile_serialization=False).
std::string TorchLegacyBytes(absl::Span<const RawTensor> tensors);

// Pieces of the two, for tests that build hostile files.
struct ZipEntry {
  std::string name;
  std::string data;
};
struct ZipOptions {
  bool zip64 = true;             // End records and sizes in their 64-bit form.
  bool data_descriptors = true;  // Flag bit 3: no sizes in the local headers.
  uint16_t method = 0;           // Claimed compression; the data is stored all the same.
};
std::string ZipBytes(absl::Span<const ZipEntry> entries, const ZipOptions& options = {});
// The pickle of {name: tensor}, whose storages are keyed "0", "1", ... in order. In legacy files their ids have a sixth
// element, None.
std::string StateDictPickle(absl::Span<const TensorSpec> tensors, bool is_legacy = false);

// A tensor as ggml's files describe it, with the type's code in that file (they differ between GGUF and rwkv.cpp).
struct GgmlTensor {
  std::string name;
  uint32_t type = 0;           // 0: F32, 1: F16
  std::vector<int64_t> shape;  // As PyTorch has it; the files list it the other way round.
  std::string data;
};

// One key of a GGUF file: its type and value, encoded.
struct GgufKey {
  std::string name;
  std::string value;
};
GgufKey GgufText(absl::string_view name, absl::string_view text);
GgufKey GgufUint32(absl::string_view name, uint32_t value);
GgufKey GgufTexts(absl::string_view name, absl::Span<const std::string> texts);  // An array of them.

struct GgufOptions {
  uint32_t version = 3;
  uint64_t alignment = 32;  // What the tensors keep; a key that says so is the caller's.
};
// As llama.cpp's gguf-py.
std::string GgufBytes(absl::Span<const GgufKey> keys, absl::Span<const GgmlTensor> tensors,
                      const GgufOptions& options = {});

// As rwkv.cpp's converter.
struct RwkvCppHeader {
  uint32_t version = 101;
  uint32_t vocab_size = 0;
  uint32_t width = 0;
  uint32_t layers = 0;
};
std::string RwkvCppBytes(const RwkvCppHeader& header, absl::Span<const GgmlTensor> tensors);

// Writes beside `path` and renames, so that nobody sees half a file. `write` is called once with a function that
// appends bytes. On error nothing is left behind.
using AppendFunction = std::function<absl::Status(absl::string_view)>;
absl::Status WriteFileAtomically(const std::string& path,
                                 const std::function<absl::Status(const AppendFunction&)>& write);
absl::Status WriteFileAtomically(const std::string& path, absl::string_view bytes);

}  // namespace rwkv::testing
