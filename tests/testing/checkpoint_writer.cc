#include "tests/testing/checkpoint_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"

namespace rwkv::testing {
namespace {

using checkpoint::ElementType;

const char* SafetensorsName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "F32";
    case ElementType::kFloat16:
      return "F16";
    case ElementType::kBFloat16:
      return "BF16";
    case ElementType::kFloat64:
      return "F64";
    case ElementType::kFloat8E4M3:
      return "F8_E4M3";
    case ElementType::kFloat8E5M2:
      return "F8_E5M2";
    case ElementType::kInt64:
      return "I64";
    case ElementType::kInt32:
      return "I32";
    case ElementType::kInt16:
      return "I16";
    case ElementType::kInt8:
      return "I8";
    case ElementType::kUint64:
      return "U64";
    case ElementType::kUint32:
      return "U32";
    case ElementType::kUint16:
      return "U16";
    case ElementType::kUint8:
      return "U8";
    case ElementType::kBool:
      return "BOOL";
  }
  return "?";
}

const char* TorchStorageName(ElementType type) {
  switch (type) {
    case ElementType::kFloat16:
      return "HalfStorage";
    case ElementType::kBFloat16:
      return "BFloat16Storage";
    case ElementType::kFloat64:
      return "DoubleStorage";
    case ElementType::kInt64:
      return "LongStorage";
    case ElementType::kInt32:
      return "IntStorage";
    case ElementType::kInt16:
      return "ShortStorage";
    case ElementType::kInt8:
      return "CharStorage";
    case ElementType::kUint8:
      return "ByteStorage";
    case ElementType::kBool:
      return "BoolStorage";
    default:
      return "FloatStorage";
  }
}

// `value` in `bytes` bytes, little-endian; beyond eight they are zero.
std::string Little(uint64_t value, int bytes) {
  std::string out(bytes, '\0');
  for (int i = 0; i < std::min(bytes, 8); ++i) out[i] = static_cast<char>(value >> (8 * i));
  return out;
}

std::string PickledString(absl::string_view text) { return absl::StrCat("X", Little(text.size(), 4), text); }

std::string PickledInt(int64_t value) {
  if (value >= 0 && value < 256) return absl::StrCat("K", Little(value, 1));
  if (value >= 0 && value <= 0x7fffffff) return absl::StrCat("J", Little(value, 4));
  return absl::StrCat("\x8a", Little(8, 1), Little(static_cast<uint64_t>(value), 8));
}

std::string PickledTuple(absl::Span<const int64_t> values) {
  std::string out = "(";
  for (int64_t value : values) out += PickledInt(value);
  return out + "t";
}

std::string PickledTensor(const TensorSpec& spec, absl::string_view key, bool is_legacy) {
  std::vector<int64_t> strides(spec.shape.size(), 1);
  for (size_t i = spec.shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, spec.shape[i]);
  return absl::StrCat("ctorch._utils\n_rebuild_tensor_v2\n((", PickledString("storage"), "ctorch\n",
                      TorchStorageName(spec.type), "\n", PickledString(key), PickledString("cpu"),
                      PickledInt(ElementsOf(spec)), is_legacy ? "N" : "", "tQ", PickledInt(0), PickledTuple(spec.shape),
                      PickledTuple(strides), "\x89", "ccollections\nOrderedDict\n)RtR");
}

std::vector<TensorSpec> SpecsOf(absl::Span<const RawTensor> tensors) {
  std::vector<TensorSpec> specs;
  for (const RawTensor& tensor : tensors) specs.push_back(tensor.spec);
  return specs;
}

std::string JsonString(absl::string_view text) { return absl::StrCat("\"", absl::Utf8SafeCEscape(text), "\""); }

}  // namespace

int64_t ElementsOf(const TensorSpec& spec) {
  int64_t elements = 1;
  for (int64_t size : spec.shape) elements *= size;
  return elements;
}

std::string SafetensorsHeader(absl::Span<const TensorSpec> tensors,
                              const std::map<std::string, std::string>& metadata) {
  std::vector<std::string> fields;
  if (!metadata.empty()) {
    fields.push_back(
        absl::StrCat("\"__metadata__\":{",
                     absl::StrJoin(metadata, ",",
                                   [](std::string* out, const std::pair<const std::string, std::string>& entry) {
                                     absl::StrAppend(out, JsonString(entry.first), ":", JsonString(entry.second));
                                   }),
                     "}"));
  }
  int64_t offset = 0;
  for (const TensorSpec& spec : tensors) {
    const int64_t end = offset + ElementsOf(spec) * checkpoint::ElementSize(spec.type);
    fields.push_back(absl::StrCat(JsonString(spec.name), ":{\"dtype\":\"", SafetensorsName(spec.type), "\",\"shape\":[",
                                  absl::StrJoin(spec.shape, ","), "],\"data_offsets\":[", offset, ",", end, "]}"));
    offset = end;
  }
  std::string json = absl::StrCat("{", absl::StrJoin(fields, ","), "}");
  json.append((8 - json.size() % 8) % 8, ' ');
  return Little(json.size(), 8) + json;
}

std::string SafetensorsBytes(absl::Span<const RawTensor> tensors, const std::map<std::string, std::string>& metadata) {
  std::string out = SafetensorsHeader(SpecsOf(tensors), metadata);
  for (const RawTensor& tensor : tensors) out += tensor.data;
  return out;
}

std::string StateDictPickle(absl::Span<const TensorSpec> tensors, bool is_legacy) {
  std::string out =
      "\x80\x02"
      "ccollections\nOrderedDict\n)R(";
  int key = 0;
  for (const TensorSpec& spec : tensors)
    out += PickledString(spec.name) + PickledTensor(spec, absl::StrCat(key++), is_legacy);
  return out + "u.";
}

std::string ZipBytes(absl::Span<const ZipEntry> entries, const ZipOptions& options) {
  const uint16_t flags = options.data_descriptors ? 0x0808 : 0x0800;
  std::string out;
  std::string directory;
  for (const ZipEntry& entry : entries) {
    const uint64_t header = out.size();
    const std::string sizes =
        options.data_descriptors ? Little(0, 8) : Little(entry.data.size(), 4) + Little(entry.data.size(), 4);
    // Zeros in a field of id "FB" bring the payload to a multiple of 64, as torch does it.
    const size_t unpadded = out.size() + 30 + entry.name.size() + 4;
    const size_t padding = (64 - unpadded % 64) % 64;
    absl::StrAppend(&out, Little(0x04034b50, 4), Little(options.zip64 ? 45 : 20, 2), Little(flags, 2),
                    Little(options.method, 2), Little(0, 8), sizes, Little(entry.name.size(), 2),
                    Little(padding + 4, 2), entry.name, "FB", Little(padding, 2), std::string(padding, '\0'),
                    entry.data);
    if (options.data_descriptors) {
      const int width = options.zip64 ? 8 : 4;
      absl::StrAppend(&out, Little(0x08074b50, 4), Little(0, 4), Little(entry.data.size(), width),
                      Little(entry.data.size(), width));
    }
    const std::string extra = options.zip64 ? absl::StrCat(Little(1, 2), Little(24, 2), Little(entry.data.size(), 8),
                                                           Little(entry.data.size(), 8), Little(header, 8))
                                            : "";
    const auto field = [&](uint64_t value) { return Little(options.zip64 ? 0xffffffff : value, 4); };
    absl::StrAppend(&directory, Little(0x02014b50, 4), Little(45, 2), Little(45, 2), Little(flags, 2),
                    Little(options.method, 2), Little(0, 8), field(entry.data.size()), field(entry.data.size()),
                    Little(entry.name.size(), 2), Little(extra.size(), 2), Little(0, 10), field(header), entry.name,
                    extra);
  }
  const uint64_t offset = out.size();
  out += directory;
  if (options.zip64) {
    const uint64_t end = out.size();
    absl::StrAppend(&out, Little(0x06064b50, 4), Little(44, 8), Little(45, 2), Little(45, 2), Little(0, 8),
                    Little(entries.size(), 8), Little(entries.size(), 8), Little(directory.size(), 8),
                    Little(offset, 8));
    absl::StrAppend(&out, Little(0x07064b50, 4), Little(0, 4), Little(end, 8), Little(1, 4));
    absl::StrAppend(&out, Little(0x06054b50, 4), Little(0, 4), Little(0xffff, 2), Little(0xffff, 2),
                    Little(0xffffffff, 4), Little(0xffffffff, 4), Little(0, 2));
  } else {
    absl::StrAppend(&out, Little(0x06054b50, 4), Little(0, 4), Little(entries.size(), 2), Little(entries.size(), 2),
                    Little(directory.size(), 4), Little(offset, 4), Little(0, 2));
  }
  return out;
}

std::string TorchZipBytes(absl::Span<const RawTensor> tensors) {
  std::vector<ZipEntry> entries = {{"archive/data.pkl", StateDictPickle(SpecsOf(tensors))},
                                   {"archive/byteorder", "little"}};
  for (size_t i = 0; i < tensors.size(); ++i) {
    entries.push_back({absl::StrCat("archive/data/", i), tensors[i].data});
  }
  entries.push_back({"archive/version", "3\n"});
  return ZipBytes(entries);
}

std::string TorchLegacyBytes(absl::Span<const RawTensor> tensors) {
  std::string keys = "\x80\x02](";
  std::string payloads;
  for (size_t i = 0; i < tensors.size(); ++i) {
    keys += PickledString(absl::StrCat(i));
    absl::StrAppend(&payloads, Little(ElementsOf(tensors[i].spec), 8), tensors[i].data);
  }
  return absl::StrCat("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", "\x80\x02M\xe9\x03.", "\x80\x02}(",
                      PickledString("protocol_version"), "M\xe9\x03", PickledString("little_endian"), "\x88u.",
                      StateDictPickle(SpecsOf(tensors), /*is_legacy=*/true), keys, "e.", payloads);
}

GgufKey GgufText(absl::string_view name, absl::string_view text) {
  return {std::string(name), absl::StrCat(Little(8, 4), Little(text.size(), 8), text)};
}

GgufKey GgufUint32(absl::string_view name, uint32_t value) {
  return {std::string(name), absl::StrCat(Little(4, 4), Little(value, 4))};
}

GgufKey GgufTexts(absl::string_view name, absl::Span<const std::string> texts) {
  std::string value = absl::StrCat(Little(9, 4), Little(8, 4), Little(texts.size(), 8));
  for (const std::string& text : texts) absl::StrAppend(&value, Little(text.size(), 8), text);
  return {std::string(name), std::move(value)};
}

std::string GgufBytes(absl::Span<const GgufKey> keys, absl::Span<const GgmlTensor> tensors,
                      const GgufOptions& options) {
  std::string out = absl::StrCat("GGUF", Little(options.version, 4), Little(tensors.size(), 8), Little(keys.size(), 8));
  for (const GgufKey& key : keys) absl::StrAppend(&out, Little(key.name.size(), 8), key.name, key.value);
  const auto pad = [&options](std::string* bytes) {
    bytes->append((options.alignment - bytes->size() % options.alignment) % options.alignment, '\0');
  };
  std::string payload;
  for (const GgmlTensor& tensor : tensors) {
    pad(&payload);
    absl::StrAppend(&out, Little(tensor.name.size(), 8), tensor.name, Little(tensor.shape.size(), 4));
    for (size_t i = tensor.shape.size(); i-- > 0;) out += Little(static_cast<uint64_t>(tensor.shape[i]), 8);
    absl::StrAppend(&out, Little(tensor.type, 4), Little(payload.size(), 8));
    payload += tensor.data;
  }
  pad(&out);
  return out + payload;
}

std::string RwkvCppBytes(const RwkvCppHeader& header, absl::Span<const GgmlTensor> tensors) {
  std::string out = absl::StrCat("fmgg", Little(header.version, 4), Little(header.vocab_size, 4),
                                 Little(header.width, 4), Little(header.layers, 4), Little(0, 4));
  for (const GgmlTensor& tensor : tensors) {
    absl::StrAppend(&out, Little(tensor.shape.size(), 4), Little(tensor.name.size(), 4), Little(tensor.type, 4));
    for (size_t i = tensor.shape.size(); i-- > 0;) out += Little(static_cast<uint64_t>(tensor.shape[i]), 4);
    absl::StrAppend(&out, tensor.name, tensor.data);
  }
  return out;
}

absl::Status WriteFileAtomically(const std::string& path,
                                 const std::function<absl::Status(const AppendFunction&)>& write) {
  const std::string temporary = absl::StrCat(path, ".tmp-", getpid());
  const int descriptor = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot create ", temporary));
  absl::Status status = write([&](absl::string_view bytes) -> absl::Status {
    while (!bytes.empty()) {
      const ssize_t count = ::write(descriptor, bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot write ", temporary));
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return absl::OkStatus();
  });
  if (status.ok() && fsync(descriptor) != 0)
    status = absl::ErrnoToStatus(errno, absl::StrCat("cannot sync ", temporary));
  close(descriptor);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0) {
    status = absl::ErrnoToStatus(errno, absl::StrCat("cannot rename ", temporary, " to ", path));
  }
  if (!status.ok()) unlink(temporary.c_str());
  return status;
}

absl::Status WriteFileAtomically(const std::string& path, absl::string_view bytes) {
  return WriteFileAtomically(path, [bytes](const AppendFunction& append) { return append(bytes); });
}

}  // namespace rwkv::testing
