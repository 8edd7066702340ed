#include "services/checkpoint/formats/safetensors.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "services/checkpoint/formats/byte_reader.h"

namespace rwkv::checkpoint {
namespace {

constexpr std::pair<absl::string_view, ElementType> kTypes[] = {
    {"F64", ElementType::kFloat64},   {"F32", ElementType::kFloat32},        {"F16", ElementType::kFloat16},
    {"BF16", ElementType::kBFloat16}, {"F8_E4M3", ElementType::kFloat8E4M3}, {"F8_E5M2", ElementType::kFloat8E5M2},
    {"I64", ElementType::kInt64},     {"I32", ElementType::kInt32},          {"I16", ElementType::kInt16},
    {"I8", ElementType::kInt8},       {"U64", ElementType::kUint64},         {"U32", ElementType::kUint32},
    {"U16", ElementType::kUint16},    {"U8", ElementType::kUint8},           {"BOOL", ElementType::kBool},
};

absl::optional<ElementType> ParseElementType(absl::string_view name) {
  for (const auto& [text, type] : kTypes) {
    if (name == text) return type;
  }
  return absl::nullopt;
}

// Builds the directory while the header is parsed, so that nothing is kept that is not wanted. Every callback returns
// false to stop the parser, which is iterative: depth costs no stack, only a bit a level.
class HeaderHandler final : public nlohmann::json_sax<nlohmann::json> {
 public:
  struct Entry {
    TensorRecord record;
    uint64_t begin = 0;  // Relative to the payload.
    uint64_t end = 0;
  };

  absl::Status status() const { return status_; }
  std::vector<Entry>& entries() { return entries_; }
  std::map<std::string, std::string>& metadata() { return metadata_; }

  bool null() override {
    if (place_ == Place::kRoot && key_ == "__metadata__") return true;  // As good as none.
    return Skipped() || Unexpected("null");
  }
  bool boolean(bool) override { return Skipped() || Unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    return Skipped() || Unexpected(absl::StrCat("the number ", value));
  }
  bool number_float(number_float_t value, const string_t& text) override {
    return Skipped() || Unexpected(absl::StrCat("the number ", text.substr(0, 40)));
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (Skipped()) return true;
    if (place_ == Place::kShapeArray) {
      if (entry_.record.shape.size() >= kMaxTensorRank) {
        return Fail(absl::StrCat("more than ", kMaxTensorRank, " dimensions"));
      }
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Fail(absl::StrCat("a dimension of ", value));
      }
      entry_.record.shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (place_ == Place::kOffsetsArray) {
      if (offsets_seen_ == 2) return Fail("more than two data_offsets");
      (offsets_seen_ == 0 ? entry_.begin : entry_.end) = value;
      ++offsets_seen_;
      return true;
    }
    return Unexpected(absl::StrCat("the number ", value));
  }

  bool string(string_t& value) override {
    if (Skipped()) return true;
    if (place_ == Place::kDtype) {
      const absl::optional<ElementType> type = ParseElementType(value);
      if (!type.has_value()) return Fail(absl::StrCat("unknown dtype ", Quoted(value)));
      entry_.record.type = *type;
      place_ = Place::kTensor;
      return true;
    }
    if (place_ == Place::kMetadata) {
      if (metadata_.size() >= kMaxSafetensorsMetadata) {
        return Fail(absl::StrCat("__metadata__ has more than ", kMaxSafetensorsMetadata, " entries"));
      }
      if (!metadata_.emplace(std::move(key_), std::move(value)).second) return Fail("__metadata__ names a key twice");
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(std::size_t) override {
    switch (place_) {
      case Place::kUnknown:
        ++unknown_depth_;
        return true;
      case Place::kStart:
        place_ = Place::kRoot;
        return true;
      case Place::kRoot:
        if (key_ == "__metadata__") {
          place_ = Place::kMetadata;
          return true;
        }
        if (entries_.size() >= kMaxTensors) return Fail(absl::StrCat("more than ", kMaxTensors, " tensors"));
        entry_ = Entry();
        entry_.record.name = std::move(key_);
        has_dtype_ = has_shape_ = has_offsets_ = false;
        place_ = Place::kTensor;
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool key(string_t& key) override {
    switch (place_) {
      case Place::kRoot:
        if (!names_.insert(key).second) return Fail(absl::StrCat("names tensor ", Quoted(key), " twice"));
        key_ = std::move(key);
        return true;
      case Place::kMetadata:
        key_ = std::move(key);
        return true;
      case Place::kTensor:
        if (key == "dtype" && !has_dtype_) {
          has_dtype_ = true;
          place_ = Place::kDtype;
        } else if (key == "shape" && !has_shape_) {
          has_shape_ = true;
          place_ = Place::kShape;
        } else if (key == "data_offsets" && !has_offsets_) {
          has_offsets_ = true;
          place_ = Place::kOffsets;
        } else if (key == "dtype" || key == "shape" || key == "data_offsets") {
          return Fail(absl::StrCat("repeated field ", Quoted(key)));
        } else {  // The reference reader takes no notice of other fields.
          place_ = Place::kUnknown;
          unknown_depth_ = 0;
        }
        return true;
      case Place::kUnknown:
        return true;
      default:
        return Unexpected("a key");
    }
  }

  bool end_object() override {
    switch (place_) {
      case Place::kUnknown:
        return EndUnknown();
      case Place::kTensor:
        if (!has_dtype_ || !has_shape_ || !has_offsets_) {
          return Fail(absl::StrCat("no ", !has_dtype_ ? "dtype" : !has_shape_ ? "shape" : "data_offsets"));
        }
        entries_.push_back(std::move(entry_));
        place_ = Place::kRoot;
        return true;
      case Place::kMetadata:
        place_ = Place::kRoot;
        return true;
      case Place::kRoot:
        place_ = Place::kEnd;
        return true;
      default:
        return Unexpected("the end of an object");
    }
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::kUnknown) {
      ++unknown_depth_;
      return true;
    }
    if (place_ == Place::kShape) {
      place_ = Place::kShapeArray;
      return true;
    }
    if (place_ == Place::kOffsets) {
      place_ = Place::kOffsetsArray;
      offsets_seen_ = 0;
      return true;
    }
    return Unexpected("an array");
  }

  bool end_array() override {
    if (place_ == Place::kUnknown) return EndUnknown();
    if (place_ == Place::kOffsetsArray && offsets_seen_ != 2) return Fail("fewer than two data_offsets");
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    status_ = absl::InvalidArgumentError(
        absl::StrCat("safetensors header is not JSON at byte ", position, ": ", Quoted(error.what())));
    return false;
  }

 private:
  // What the next value is.
  enum class Place {
    kStart, kRoot, kMetadata, kTensor, kDtype, kShape, kShapeArray, kOffsets, kOffsetsArray, kUnknown, kEnd
  };

  // A plain value in a field of a tensor that nobody here knows.
  bool Skipped() {
    if (place_ != Place::kUnknown) return false;
    if (unknown_depth_ == 0) place_ = Place::kTensor;
    return true;
  }
  bool EndUnknown() {
    if (--unknown_depth_ == 0) place_ = Place::kTensor;
    return true;
  }

  bool Fail(absl::string_view what) {
    const bool in_tensor = place_ != Place::kStart && place_ != Place::kRoot && place_ != Place::kMetadata;
    status_ = absl::InvalidArgumentError(absl::StrCat(
        "safetensors header: ", in_tensor ? absl::StrCat("tensor ", Quoted(entry_.record.name), ": ") : "", what));
    return false;
  }
  bool Unexpected(absl::string_view what) {
    return Fail(absl::StrCat("unexpected ", what, place_ == Place::kRoot ? absl::StrCat(" for ", Quoted(key_)) : ""));
  }

  absl::Status status_ = absl::OkStatus();
  Place place_ = Place::kStart;
  std::string key_;
  Entry entry_;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  int offsets_seen_ = 0;
  int64_t unknown_depth_ = 0;  // kUnknown: open objects and arrays.
  std::vector<Entry> entries_;
  absl::flat_hash_set<std::string> names_;
  std::map<std::string, std::string> metadata_;
};

absl::Status CheckTensor(const HeaderHandler::Entry& entry, uint64_t payload_bytes) {
  const std::string what = absl::StrCat("tensor ", Quoted(entry.record.name), ": ");
  const std::string range = absl::StrCat("data_offsets [", entry.begin, ", ", entry.end, ")");
  if (entry.begin > entry.end) return absl::InvalidArgumentError(absl::StrCat(what, range, " end before they begin"));
  if (entry.end > payload_bytes) {
    return absl::DataLossError(
        absl::StrCat(what, range, " reach beyond the ", payload_bytes, " bytes of data in the file"));
  }
  const absl::optional<int64_t> bytes = ByteCount(entry.record.shape, entry.record.type);
  if (!bytes.has_value() || static_cast<uint64_t>(*bytes) != entry.end - entry.begin) {
    return absl::InvalidArgumentError(absl::StrCat(what, ElementTypeName(entry.record.type), " of shape ",
                                                   ShapeString(entry.record.shape), " does not take the ",
                                                   entry.end - entry.begin, " bytes of its ", range));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SafetensorsDirectory> ReadSafetensors(absl::Span<const uint8_t> file) {
  ByteReader reader(file);
  uint64_t header_bytes = 0;
  if (!reader.U64(&header_bytes)) {
    return absl::DataLossError(absl::StrCat("a file of ", file.size(), " bytes is too short for a checkpoint"));
  }
  if (header_bytes > static_cast<uint64_t>(kMaxSafetensorsHeaderBytes)) {
    // Hardly a large header: whatever begins with other bytes than the known formats do comes here.
    return absl::InvalidArgumentError("not a checkpoint of a known format (.pth, .safetensors, GGUF, rwkv.cpp's .bin)");
  }
  absl::Span<const uint8_t> header;
  if (!reader.Bytes(header_bytes, &header)) {
    return absl::DataLossError(absl::StrCat("safetensors header of ", header_bytes, " bytes, but only ",
                                            reader.remaining(), " are left in the file"));
  }
  if (header.empty() || header[0] != '{') {
    return absl::InvalidArgumentError("not a checkpoint of a known format: no safetensors header");
  }
  // The JSON parser takes a zero byte for the end and would not look at what follows.
  if (const auto zero = std::find(header.begin(), header.end(), 0); zero != header.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("safetensors header is not JSON at byte ", zero - header.begin(), ": a zero byte"));
  }

  HeaderHandler handler;
  const char* text = reinterpret_cast<const char*>(header.data());
  const bool parsed = nlohmann::json::sax_parse(text, text + header.size(), &handler);
  RWKV_RETURN_IF_ERROR(handler.status());
  if (!parsed) return absl::InvalidArgumentError("safetensors header is not JSON");

  const uint64_t payload_start = reader.position();
  const uint64_t payload_bytes = reader.remaining();
  std::vector<HeaderHandler::Entry>& entries = handler.entries();
  for (const HeaderHandler::Entry& entry : entries) RWKV_RETURN_IF_ERROR(CheckTensor(entry, payload_bytes));

  std::sort(entries.begin(), entries.end(), [](const HeaderHandler::Entry& a, const HeaderHandler::Entry& b) {
    return std::make_pair(a.begin, a.end) < std::make_pair(b.begin, b.end);
  });
  SafetensorsDirectory directory;
  directory.metadata = std::move(handler.metadata());
  directory.tensors.reserve(entries.size());
  uint64_t covered = 0;
  for (HeaderHandler::Entry& entry : entries) {
    if (entry.begin != covered) {
      const std::string previous =
          directory.tensors.empty() ? "the header" : absl::StrCat("tensor ", Quoted(directory.tensors.back().name));
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(entry.record.name), " begins at byte ", entry.begin, " of the data, but ",
                       previous, " before it ends at ", covered,
                       entry.begin < covered ? ": they overlap" : ": the bytes between are nobody's"));
    }
    covered = entry.end;
    entry.record.offset = static_cast<int64_t>(payload_start + entry.begin);
    directory.tensors.push_back(std::move(entry.record));
  }
  if (covered != payload_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the last ", payload_bytes - covered, " bytes of the file belong to no tensor"));
  }
  return directory;
}

absl::string_view SafetensorsName(ElementType type) {
  for (const auto& [text, named] : kTypes) {
    if (named == type) return text;
  }
  return "";
}

}  // namespace rwkv::checkpoint
