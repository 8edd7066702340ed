#include "services/checkpoint/formats/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/byte_reader.h"

namespace rwkv::checkpoint {
namespace {

constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr uint32_t kMaxDimensions = 4;

// Types of values. docs/gguf.md, "enum gguf_metadata_value_type".
enum ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// Bytes of a number; nothing for texts, arrays and what is no type.
absl::optional<uint64_t> NumberBytes(uint32_t type) {
  switch (type) {
    case kUint8:
    case kInt8:
    case kBool:
      return 1;
    case kUint16:
    case kInt16:
      return 2;
    case kUint32:
    case kInt32:
    case kFloat32:
      return 4;
    case kUint64:
    case kInt64:
    case kFloat64:
      return 8;
    default:
      return absl::nullopt;
  }
}

struct TensorType {
  ElementType type;
  BlockType blocks;
};

// ggml.h, "enum ggml_type".
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
    case 6:
      return TensorType{ElementType::kFloat32, BlockType::kQ5_0};
    case 7:
      return TensorType{ElementType::kFloat32, BlockType::kQ5_1};
    case 8:
      return TensorType{ElementType::kFloat32, BlockType::kQ8_0};
    case 12:
      return TensorType{ElementType::kFloat32, BlockType::kQ4_K};
    case 13:
      return TensorType{ElementType::kFloat32, BlockType::kQ5_K};
    case 14:
      return TensorType{ElementType::kFloat32, BlockType::kQ6_K};
    case 30:
      return TensorType{ElementType::kBFloat16, BlockType::kNone};
    default:
      return absl::nullopt;
  }
}

class Reader {
 public:
  explicit Reader(absl::Span<const uint8_t> file)
      : file_(file), reader_(file.subspan(0, std::min<uint64_t>(file.size(), kMaxGgufHeaderBytes))) {}

  absl::StatusOr<GgufDirectory> Read() {
    uint64_t tensors = 0;
    uint64_t keys = 0;
    RWKV_RETURN_IF_ERROR(ReadCounts(&tensors, &keys));
    for (uint64_t i = 0; i < keys; ++i) RWKV_RETURN_IF_ERROR(ReadKey());
    if (!directory_.token_types.empty() && directory_.token_types.size() != directory_.tokens.size()) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", directory_.tokens.size(), " tokens, but ",
                                                     directory_.token_types.size(), " token types"));
    }
    for (uint64_t i = 0; i < tensors; ++i) RWKV_RETURN_IF_ERROR(ReadTensorInfo());
    RWKV_RETURN_IF_ERROR(PlaceTensors());
    return std::move(directory_);
  }

 private:
  absl::Status TooShort(absl::string_view what) const {
    if (file_.size() > kMaxGgufHeaderBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("GGUF: ", what, " reaches beyond the first ", kMaxGgufHeaderBytes, " bytes"));
    }
    return absl::DataLossError(absl::StrCat("GGUF: the file ends at byte ", file_.size(), ", inside ", what));
  }

  absl::Status ReadCounts(uint64_t* tensors, uint64_t* keys) {
    uint32_t version = 0;
    absl::Span<const uint8_t> magic;
    if (!reader_.Bytes(4, &magic) || !reader_.U32(&version)) return TooShort("the version");
    if (version >> 16 != 0) return absl::UnimplementedError("a GGUF file of big-endian numbers");
    if (version != 2 && version != 3) {
      return absl::UnimplementedError(absl::StrCat("GGUF version ", version, "; versions 2 and 3 are read"));
    }
    if (!reader_.U64(tensors) || !reader_.U64(keys)) return TooShort("the counts");
    if (*tensors > kMaxTensors) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", *tensors, " tensors; at most ", kMaxTensors));
    }
    if (*keys > kMaxGgufKeys) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", *keys, " keys; at most ", kMaxGgufKeys));
    }
    return absl::OkStatus();
  }

  absl::Status ReadText(absl::string_view what, absl::string_view* out) {
    uint64_t size = 0;
    absl::Span<const uint8_t> bytes;
    if (!reader_.U64(&size)) return TooShort(what);
    if (size > kMaxGgufTextBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("GGUF: ", what, " is ", size, " bytes long; at most ", kMaxGgufTextBytes));
    }
    if (!reader_.Bytes(size, &bytes)) return TooShort(what);
    *out = absl::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return absl::OkStatus();
  }

  // Its type is one of a number.
  absl::Status ReadNumber(uint32_t type, const std::string& what, std::string* text) {
    absl::Span<const uint8_t> bytes;
    if (!reader_.Bytes(*NumberBytes(type), &bytes)) return TooShort(what);
    uint64_t bits = 0;
    for (size_t i = 0; i < bytes.size(); ++i) bits |= uint64_t{bytes[i]} << (8 * i);
    switch (type) {
      case kInt8:
        *text = absl::StrCat(static_cast<int8_t>(bits));
        break;
      case kInt16:
        *text = absl::StrCat(static_cast<int16_t>(bits));
        break;
      case kInt32:
        *text = absl::StrCat(static_cast<int32_t>(bits));
        break;
      case kInt64:
        *text = absl::StrCat(static_cast<int64_t>(bits));
        break;
      case kBool:
        *text = bits != 0 ? "true" : "false";
        break;
      case kFloat32: {
        const uint32_t narrow = static_cast<uint32_t>(bits);
        float value = 0;
        std::memcpy(&value, &narrow, sizeof(value));
        *text = absl::StrCat(value);
        break;
      }
      case kFloat64: {
        double value = 0;
        std::memcpy(&value, &bits, sizeof(value));
        *text = absl::StrCat(value);
        break;
      }
      default:
        *text = absl::StrCat(bits);
        break;
    }
    return absl::OkStatus();
  }

  absl::Status ReadKey() {
    absl::string_view key;
    RWKV_RETURN_IF_ERROR(ReadText("a key", &key));
    const std::string what = absl::StrCat("key ", Quoted(key));
    uint32_t type = 0;
    if (!reader_.U32(&type)) return TooShort(what);
    if (type == kArray) return ReadArray(key, what);
    std::string text;
    if (type == kString) {
      absl::string_view view;
      RWKV_RETURN_IF_ERROR(ReadText(what, &view));
      text = std::string(view);
    } else if (NumberBytes(type).has_value()) {
      RWKV_RETURN_IF_ERROR(ReadNumber(type, what, &text));
    } else {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " has a value of the unknown type ", type));
    }
    if (key == "general.alignment") {
      RWKV_RETURN_IF_ERROR(SetAlignment(text));
    }
    if (!directory_.metadata.emplace(std::string(key), std::move(text)).second) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " is there twice"));
    }
    return absl::OkStatus();
  }

  absl::Status SetAlignment(const std::string& text) {
    uint64_t value = 0;
    if (!absl::SimpleAtoi(text, &value) || value == 0 || (value & (value - 1)) != 0 || value > kMaxAlignment) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: general.alignment is ", text.substr(0, 40),
                                                     ", not a power of two up to ", kMaxAlignment));
    }
    alignment_ = value;
    return absl::OkStatus();
  }

  absl::Status ReadArray(absl::string_view key, const std::string& what) {
    uint32_t type = 0;
    uint64_t count = 0;
    if (!reader_.U32(&type) || !reader_.U64(&count)) return TooShort(what);
    if (absl::StartsWith(key, "tokenizer.ggml.token") && count > kMaxGgufTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("GGUF: ", what, " has ", count, " entries; at most ", kMaxGgufTokens));
    }
    if (type == kString) {
      const bool keep = key == "tokenizer.ggml.tokens";
      if (keep && !directory_.tokens.empty()) {
        return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " is there twice"));
      }
      // Each text takes eight bytes at least, so that a lying count ends with the file.
      for (uint64_t i = 0; i < count; ++i) {
        absl::string_view text;
        RWKV_RETURN_IF_ERROR(ReadText(what, &text));
        if (keep) directory_.tokens.push_back(text);
      }
      return absl::OkStatus();
    }
    const absl::optional<uint64_t> size = NumberBytes(type);
    if (!size.has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " is an array of type ", type));
    }
    if (count > reader_.remaining() / *size) return TooShort(what);
    if (key == "tokenizer.ggml.token_type" && type == kInt32 && directory_.token_types.empty()) {
      for (uint64_t i = 0; i < count; ++i) {
        uint32_t value = 0;
        reader_.U32(&value);
        directory_.token_types.push_back(static_cast<int32_t>(value));
      }
      return absl::OkStatus();
    }
    reader_.Skip(count * *size);
    return absl::OkStatus();
  }

  absl::Status ReadTensorInfo() {
    absl::string_view name;
    RWKV_RETURN_IF_ERROR(ReadText("a tensor's name", &name));
    const std::string what = absl::StrCat("tensor ", Quoted(name));
    TensorRecord record;
    record.name = std::string(name);
    uint32_t dimensions = 0;
    if (!reader_.U32(&dimensions)) return TooShort(what);
    if (dimensions > kMaxDimensions) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " has ", dimensions, " dimensions"));
    }
    record.shape.resize(dimensions);
    for (uint32_t i = dimensions; i-- > 0;) {  // The file lists the fastest first.
      uint64_t size = 0;
      if (!reader_.U64(&size)) return TooShort(what);
      if (size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " has a dimension of ", size));
      }
      record.shape[i] = static_cast<int64_t>(size);
    }
    uint32_t type_code = 0;
    uint64_t offset = 0;
    if (!reader_.U32(&type_code) || !reader_.U64(&offset)) return TooShort(what);
    const absl::optional<TensorType> type = ParseTensorType(type_code);
    if (!type.has_value()) {
      return absl::UnimplementedError(absl::StrCat(
          "GGUF: ", what, " has ggml type ", type_code,
          "; read are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K: requantize the model to one"));
    }
    record.type = type->type;
    record.blocks = type->blocks;
    // The largest of what the elements take in memory and in the file, so that no later sum overflows.
    if (!ByteCount(record.shape, ElementType::kFloat64).has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " has the shape ", ShapeString(record.shape)));
    }
    if (const int64_t weights = BlockWeights(record.blocks);
        !record.shape.empty() && record.shape.back() % weights != 0) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " has rows of ", record.shape.back(), ", which ",
                                                     BlockTypeName(record.blocks), " blocks of ", weights,
                                                     " do not fill"));
    }
    if (record.shape.empty() && record.blocks != BlockType::kNone) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " is a scalar in blocks"));
    }
    if (offset % alignment_ != 0 || offset > file_.size()) {
      return absl::InvalidArgumentError(absl::StrCat("GGUF: ", what, " begins at offset ", offset, " (alignment ",
                                                     alignment_, ", file of ", file_.size(), " bytes)"));
    }
    record.offset = static_cast<int64_t>(offset);  // From the start of the payload, for now.
    directory_.tensors.push_back(std::move(record));
    return absl::OkStatus();
  }

  absl::Status PlaceTensors() {
    const uint64_t payload = (reader_.position() + alignment_ - 1) / alignment_ * alignment_;
    std::vector<const TensorRecord*> by_offset;
    for (TensorRecord& record : directory_.tensors) {
      record.offset += static_cast<int64_t>(payload);
      const int64_t bytes = StoredBytes(record);
      if (bytes == 0) {
        record.offset = 0;
        continue;
      }
      // Neither sum overflows: an offset is at most a file's size.
      if (bytes > static_cast<int64_t>(file_.size()) - record.offset) {
        return absl::DataLossError(absl::StrCat("GGUF: the file ends at byte ", file_.size(), ", but tensor ",
                                                Quoted(record.name), " takes ", bytes, " bytes from ", record.offset));
      }
      by_offset.push_back(&record);
    }
    std::sort(by_offset.begin(), by_offset.end(),
              [](const TensorRecord* a, const TensorRecord* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < by_offset.size(); ++i) {
      if (by_offset[i - 1]->offset + StoredBytes(*by_offset[i - 1]) > by_offset[i]->offset) {
        return absl::InvalidArgumentError(absl::StrCat("GGUF: tensors ", Quoted(by_offset[i - 1]->name), " and ",
                                                       Quoted(by_offset[i]->name), " overlap"));
      }
    }
    return absl::OkStatus();
  }

  const absl::Span<const uint8_t> file_;
  ByteReader reader_;
  uint64_t alignment_ = kDefaultAlignment;
  GgufDirectory directory_;
};

}  // namespace

absl::StatusOr<GgufDirectory> ReadGguf(absl::Span<const uint8_t> file) { return Reader(file).Read(); }

}  // namespace rwkv::checkpoint
