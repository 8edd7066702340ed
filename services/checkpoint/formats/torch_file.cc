#include "services/checkpoint/formats/torch_file.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/pickle.h"
#include "services/checkpoint/formats/zip_archive.h"

namespace rwkv::checkpoint {
namespace {

using Kind = Pickle::Kind;
using Value = Pickle::Value;

// The pickle of the integer 0x1950A86A20F9469CFC6C (torch/serialization.py, MAGIC_NUMBER).
constexpr uint8_t kLegacyMagic[] = {0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46,
                                    0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, 0x2e};
constexpr int64_t kLegacyProtocol = 1001;

bool StartsWith(absl::Span<const uint8_t> file, absl::Span<const uint8_t> prefix) {
  return file.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), file.begin());
}

// Index of the last element a view reaches, counted from the start of its storage; nothing on overflow or a negative
// number. The view has at least one element.
absl::optional<int64_t> LastElement(const PickledTensor& tensor) {
  if (tensor.offset < 0) return absl::nullopt;
  int64_t last = tensor.offset;
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    int64_t reach = 0;
    if (tensor.strides[i] < 0 || __builtin_mul_overflow(tensor.shape[i] - 1, tensor.strides[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return absl::nullopt;
    }
  }
  return last;
}

absl::StatusOr<TensorRecord> MakeRecord(absl::string_view name, const PickledTensor& tensor,
                                        const PickledStorage& storage, uint64_t storage_offset) {
  const std::string view = absl::StrCat("tensor ", Quoted(name), " of shape ", ShapeString(tensor.shape), ", stride ",
                                        ShapeString(tensor.strides), ", offset ", tensor.offset);
  const std::string of_storage = absl::StrCat(" storage ", Quoted(storage.key), " of ", storage.elements, " elements");
  if (tensor.shape.size() != tensor.strides.size()) {
    return absl::InvalidArgumentError(absl::StrCat(view, ": as many strides as dimensions are needed"));
  }
  const absl::optional<int64_t> count = ElementCount(tensor.shape);
  if (!count.has_value()) return absl::InvalidArgumentError(absl::StrCat(view, ": impossible shape"));
  if (*count > storage.elements) {
    return absl::InvalidArgumentError(absl::StrCat(view, " has more elements than", of_storage));
  }
  if (*count == 0) {
    if (tensor.offset < 0 || tensor.offset > storage.elements) {
      return absl::InvalidArgumentError(absl::StrCat(view, " lies outside", of_storage));
    }
  } else {
    const absl::optional<int64_t> last = LastElement(tensor);
    if (!last.has_value() || *last >= storage.elements) {
      return absl::InvalidArgumentError(absl::StrCat(view, " reaches out of", of_storage));
    }
  }
  TensorRecord record;
  record.name = std::string(name);
  record.type = storage.type;
  record.shape = tensor.shape;
  record.strides = tensor.strides;
  // Fits: the storage's bytes lie in the file.
  record.offset = static_cast<int64_t>(storage_offset) + tensor.offset * ElementSize(storage.type);
  return record;
}

// `storage_offsets`: where each of pickle.storages() begins in the file; their bytes have been checked.
absl::StatusOr<TorchDirectory> MakeRecords(const Pickle& pickle, const std::vector<uint64_t>& storage_offsets) {
  RWKV_ASSIGN_OR_RETURN(const auto tensors, pickle.StateDict());
  TorchDirectory directory;
  directory.skipped.assign(pickle.opaque().begin(), pickle.opaque().end());
  directory.tensors.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    RWKV_ASSIGN_OR_RETURN(TensorRecord record, MakeRecord(name, *tensor, pickle.storages()[tensor->storage],
                                                          storage_offsets[tensor->storage]));
    directory.tensors.push_back(std::move(record));
  }
  return directory;
}

absl::optional<uint64_t> StorageBytes(const PickledStorage& storage) {
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(static_cast<uint64_t>(storage.elements), static_cast<uint64_t>(ElementSize(storage.type)),
                             &bytes)) {
    return absl::nullopt;
  }
  return bytes;
}

std::string StorageString(const PickledStorage& storage) {
  return absl::StrCat("storage ", Quoted(storage.key), " of ", storage.elements, " ", ElementTypeName(storage.type));
}

// One of the pickles at the start of a legacy file.
absl::StatusOr<Pickle> NextPickle(absl::Span<const uint8_t> file, absl::string_view what, uint64_t* position) {
  absl::StatusOr<Pickle> pickle = Pickle::Parse(file.subspan(*position));
  if (!pickle.ok()) {
    return absl::Status(pickle.status().code(),
                        absl::StrCat(what, " at byte ", *position, ": ", pickle.status().message()));
  }
  *position += static_cast<uint64_t>(pickle->size_bytes());
  return pickle;
}

}  // namespace

bool LooksLikeTorchZip(absl::Span<const uint8_t> file) { return StartsWith(file, {0x50, 0x4b, 0x03, 0x04}); }

bool LooksLikeTorchLegacy(absl::Span<const uint8_t> file) {
  return StartsWith(file, absl::MakeConstSpan(kLegacyMagic).first(4));
}

absl::StatusOr<TorchDirectory> ReadTorchZip(absl::Span<const uint8_t> file, DoneWith done) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<ZipMember> members, ReadZipDirectory(file, done));
  absl::flat_hash_map<absl::string_view, const ZipMember*> by_name;
  const ZipMember* data_pickle = nullptr;
  for (const ZipMember& member : members) {
    if (member.is_deflated) {
      return absl::UnimplementedError(absl::StrCat("member ", Quoted(member.name), " is still compressed"));
    }
    if (!by_name.emplace(member.name, &member).second) {
      return absl::InvalidArgumentError(absl::StrCat("zip archive: two members are named ", Quoted(member.name)));
    }
    if (member.name != "data.pkl" && !absl::EndsWith(member.name, "/data.pkl")) continue;
    if (data_pickle != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("not a torch checkpoint: both ", Quoted(data_pickle->name),
                                                     " and ", Quoted(member.name), " would be its pickle"));
    }
    data_pickle = &member;
  }
  if (data_pickle == nullptr) {
    return absl::InvalidArgumentError("a zip archive, but not a torch checkpoint: it has no data.pkl");
  }
  const absl::string_view folder = data_pickle->name.substr(0, data_pickle->name.size() - sizeof("data.pkl") + 1);
  const auto bytes_of = [&](const ZipMember& member) { return file.subspan(member.offset, member.size); };

  if (const auto order = by_name.find(absl::StrCat(folder, "byteorder")); order != by_name.end()) {
    const absl::Span<const uint8_t> bytes = bytes_of(*order->second);
    const absl::string_view text =
        absl::StripAsciiWhitespace({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    if (text != "little") {
      return absl::UnimplementedError(absl::StrCat("byte order ", Quoted(text), "; only \"little\" is read"));
    }
  }
  RWKV_ASSIGN_OR_RETURN(const Pickle pickle, Pickle::Parse(bytes_of(*data_pickle)));
  if (static_cast<uint64_t>(pickle.size_bytes()) != data_pickle->size) {
    return absl::InvalidArgumentError(absl::StrCat(Quoted(data_pickle->name), " goes on after its pickle"));
  }

  std::vector<uint64_t> offsets;
  for (const PickledStorage& storage : pickle.storages()) {
    const auto found = by_name.find(absl::StrCat(folder, "data/", storage.key));
    if (found == by_name.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(StorageString(storage), " has no member ", Quoted(absl::StrCat(folder, "data/", storage.key))));
    }
    if (StorageBytes(storage) != found->second->size) {
      return absl::InvalidArgumentError(absl::StrCat(StorageString(storage), " has a member ",
                                                     Quoted(found->second->name), " of ", found->second->size,
                                                     " bytes"));
    }
    offsets.push_back(found->second->offset);
  }
  return MakeRecords(pickle, offsets);
}

absl::StatusOr<TorchDirectory> ReadTorchLegacy(absl::Span<const uint8_t> file, DoneWith done) {
  if (!StartsWith(file, kLegacyMagic)) {
    return absl::InvalidArgumentError("starts like a legacy torch file, but its magic number is wrong");
  }
  uint64_t position = sizeof(kLegacyMagic);
  RWKV_ASSIGN_OR_RETURN(const Pickle protocol, NextPickle(file, "legacy protocol", &position));
  if (protocol.root().kind != Kind::kInt || protocol.root().payload != kLegacyProtocol) {
    return absl::InvalidArgumentError(absl::StrCat("legacy torch file: its protocol is not ", kLegacyProtocol));
  }
  RWKV_ASSIGN_OR_RETURN(const Pickle system, NextPickle(file, "legacy system info", &position));
  if (system.root().kind != Kind::kDict) return absl::InvalidArgumentError("legacy torch file: no system info");
  for (const auto& [key, value] : system.Entries(system.root())) {
    if (key.kind == Kind::kString && system.AsString(key) == "little_endian" &&
        (value.kind != Kind::kBool || value.payload == 0)) {
      return absl::UnimplementedError("legacy torch file: big-endian");
    }
  }
  RWKV_ASSIGN_OR_RETURN(const Pickle pickle, NextPickle(file, "legacy state dict", &position));
  RWKV_ASSIGN_OR_RETURN(const Pickle keys, NextPickle(file, "legacy storage keys", &position));
  if (keys.root().kind != Kind::kList) return absl::InvalidArgumentError("legacy torch file: no list of storage keys");

  absl::flat_hash_map<absl::string_view, int> index_of;
  for (const PickledStorage& storage : pickle.storages()) index_of.emplace(storage.key, index_of.size());
  std::vector<uint64_t> offsets(pickle.storages().size(), 0);
  ByteReader reader(file, position);
  for (const Value& key : keys.Items(keys.root())) {
    const auto found = key.kind == Kind::kString ? index_of.find(keys.AsString(key)) : index_of.end();
    if (found == index_of.end() || offsets[found->second] != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("legacy torch file: storage key ",
                       key.kind == Kind::kString ? Quoted(keys.AsString(key)) : "that is no string",
                       " is listed twice or belongs to no tensor"));
    }
    const PickledStorage& storage = pickle.storages()[found->second];
    uint64_t elements = 0;
    if (!reader.U64(&elements))
      return absl::DataLossError(absl::StrCat("the file ends before ", StorageString(storage)));
    if (elements != static_cast<uint64_t>(storage.elements)) {
      return absl::InvalidArgumentError(
          absl::StrCat(StorageString(storage), " has a payload of ", elements, " elements"));
    }
    const absl::optional<uint64_t> bytes = StorageBytes(storage);
    offsets[found->second] = reader.position();
    done(reader.position() - sizeof(elements), sizeof(elements));
    if (!bytes.has_value() || !reader.Skip(*bytes)) {
      return absl::DataLossError(absl::StrCat("the file ends inside ", StorageString(storage)));
    }
  }
  for (size_t i = 0; i < offsets.size(); ++i) {
    if (offsets[i] == 0) {
      return absl::InvalidArgumentError(absl::StrCat(StorageString(pickle.storages()[i]), " has no payload"));
    }
  }
  if (reader.remaining() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the last ", reader.remaining(), " bytes of the file belong to no storage"));
  }
  return MakeRecords(pickle, offsets);
}

}  // namespace rwkv::checkpoint
