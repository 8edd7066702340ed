#include "services/checkpoint/formats/rwkv_cpp.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/byte_reader.h"

namespace rwkv::checkpoint {
namespace {

constexpr uint32_t kMaxDimensions = 3;
constexpr uint32_t kMaxNameBytes = 512;

struct TensorType {
  ElementType type;
  BlockType blocks;
};

absl::optional<TensorType> ParseTensorType(uint32_t type) {
  switch (type) {
    case 0:
      return TensorType{ElementType::kFloat32, BlockType::kNone};
    case 1:
      return TensorType{ElementType::kFloat16, BlockType::kNone};
    case 2:
      return TensorType{ElementType::kFloat32, BlockType::kQ4_0};
    case 3:
      return TensorType{ElementType::kFloat32, BlockType::kQ4_1};
    case 7:
      return TensorType{ElementType::kFloat32, BlockType::kQ5_0};
    case 8:
      return TensorType{ElementType::kFloat32, BlockType::kQ5_1};
    case 9:
      return TensorType{ElementType::kFloat32, BlockType::kQ8_0};
    default:
      return absl::nullopt;
  }
}

absl::Status ReadTensorHeader(absl::Span<const uint8_t> file, ByteReader* reader, bool may_have_blocks,
                              TensorRecord* record) {
  const auto at = [&file, start = reader->position()](absl::string_view what) {
    return absl::DataLossError(absl::StrCat("rwkv.cpp: the file ends at byte ", file.size(), ", inside ", what,
                                            " of the tensor at byte ", start));
  };
  const uint64_t start = reader->position();
  uint32_t dimensions = 0;
  uint32_t name_bytes = 0;
  uint32_t type_code = 0;
  if (!reader->U32(&dimensions) || !reader->U32(&name_bytes) || !reader->U32(&type_code)) return at("the header");
  if (dimensions < 1 || dimensions > kMaxDimensions || name_bytes < 1 || name_bytes > kMaxNameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("rwkv.cpp: the tensor at byte ", start, " has ", dimensions,
                                                   " dimensions and a name of ", name_bytes, " bytes"));
  }
  record->shape.resize(dimensions);
  for (uint32_t i = dimensions; i-- > 0;) {  // The file lists the fastest first.
    uint32_t size = 0;
    if (!reader->U32(&size)) return at("the header");
    record->shape[i] = static_cast<int32_t>(size);
  }
  absl::Span<const uint8_t> name;
  if (!reader->Bytes(name_bytes, &name)) return at("the name");
  record->name.assign(reinterpret_cast<const char*>(name.data()), name.size());
  const std::string what = absl::StrCat("rwkv.cpp: tensor ", Quoted(record->name));

  const absl::optional<TensorType> type = ParseTensorType(type_code);
  if (!type.has_value()) {
    return absl::UnimplementedError(
        absl::StrCat(what, " has data type ", type_code, "; read are F32, F16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0"));
  }
  record->type = type->type;
  record->blocks = type->blocks;
  if (record->blocks != BlockType::kNone && !may_have_blocks) {
    return absl::UnimplementedError(
        absl::StrCat(what, " is ", BlockTypeName(record->blocks), " in a file of version 100, whose blocks differ"));
  }
  for (int64_t size : record->shape) {
    if (size < 1) return absl::InvalidArgumentError(absl::StrCat(what, " has the shape ", ShapeString(record->shape)));
  }
  if (!ByteCount(record->shape, ElementType::kFloat64).has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has the shape ", ShapeString(record->shape)));
  }
  if (record->shape.back() % BlockWeights(record->blocks) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has rows of ", record->shape.back(), ", which ",
                                                   BlockTypeName(record->blocks), " blocks do not fill"));
  }
  record->offset = static_cast<int64_t>(reader->position());
  const int64_t bytes = StoredBytes(*record);
  if (!reader->Skip(static_cast<uint64_t>(bytes))) {
    return absl::DataLossError(absl::StrCat(what, " takes ", bytes, " bytes from ", record->offset,
                                            ", but the file ends at byte ", file.size()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RwkvCppDirectory> ReadRwkvCpp(absl::Span<const uint8_t> file, DoneWith done) {
  ByteReader reader(file);
  uint32_t header[6];
  for (uint32_t& number : header) {
    if (!reader.U32(&number)) {
      return absl::DataLossError(absl::StrCat("rwkv.cpp: the file ends at byte ", file.size(), ", inside its header"));
    }
  }
  const uint32_t version = header[1];
  if (version != 100 && version != 101) {
    return absl::UnimplementedError(absl::StrCat("rwkv.cpp file version ", version, "; versions 100 and 101 are read"));
  }
  RwkvCppDirectory directory;
  directory.vocab_size = static_cast<int32_t>(header[2]);
  directory.width = static_cast<int32_t>(header[3]);
  directory.layer_count = static_cast<int32_t>(header[4]);
  while (reader.remaining() > 0) {
    if (directory.tensors.size() == kMaxTensors) {
      return absl::InvalidArgumentError(absl::StrCat("rwkv.cpp: more than ", kMaxTensors, " tensors"));
    }
    TensorRecord record;
    const uint64_t start = reader.position();
    RWKV_RETURN_IF_ERROR(ReadTensorHeader(file, &reader, version == 101, &record));
    done(start, static_cast<uint64_t>(record.offset) - start);
    directory.tensors.push_back(std::move(record));
  }
  return directory;
}

}  // namespace rwkv::checkpoint
