#include "services/checkpoint/formats/pickle.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/pickle_builder.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {
namespace {

using Kind = Pickle::Kind;
using Value = Pickle::Value;

// https://github.com/python/cpython/blob/3.11/Lib/pickletools.py
enum Opcode : uint8_t {
  kMark = '(',
  kStop = '.',
  kBinFloat = 'G',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNone = 'N',
  kBinPersistentId = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kEmptyDict = '}',
  kAppends = 'e',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kEmptyList = ']',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kEmptyTuple = ')',
  kSetItems = 'u',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
  kShortBinUnicode = 0x8c,
  kStackGlobal = 0x93,
  kMemoize = 0x94,
  kFrame = 0x95,
  // Of opaque values.
  kPop = '0',
  kPopMark = '1',
  kDup = '2',
  kBinBytes = 'B',
  kShortBinBytes = 'C',
  kBinString = 'T',
  kShortBinString = 'U',
  kNewObject = 0x81,
  kLong4 = 0x8b,
  kBinUnicode8 = 0x8d,
  kBinBytes8 = 0x8e,
  kEmptySet = 0x8f,
  kAddItems = 0x90,
  kFrozenSet = 0x91,
  kNewObjectEx = 0x92,
  kByteArray8 = 0x96,
};

}  // namespace

// Decodes opcodes and has the builder do what they say.
class PickleMachine {
 public:
  explicit PickleMachine(absl::Span<const uint8_t> bytes) : reader_(bytes) {}

  absl::StatusOr<Pickle> Run() {
    for (int64_t opcodes = 0; !stopped_; ++opcodes) {
      const uint64_t at = reader_.position();
      const absl::Status status = Step(opcodes);
      if (!status.ok()) return absl::Status(status.code(), absl::StrCat("pickle, byte ", at, ": ", status.message()));
    }
    pickle_.size_bytes_ = static_cast<int64_t>(reader_.position());
    return std::move(pickle_);
  }

 private:
  static absl::Status Truncated() { return absl::DataLossError("the data ends inside the pickle"); }

  absl::Status ReadString(uint64_t length) {
    if (length > static_cast<uint64_t>(PickleLimits::kStringBytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("string of ", length, " bytes, above the limit of ", PickleLimits::kStringBytes));
    }
    absl::Span<const uint8_t> bytes;
    if (!reader_.Bytes(length, &bytes)) return Truncated();
    return builder_.PushString({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }

  absl::Status ReadLine(absl::string_view* line) {
    const uint64_t limit = std::min<uint64_t>(reader_.remaining(), PickleLimits::kGlobalBytes + 1);
    ByteReader ahead = reader_;
    absl::Span<const uint8_t> bytes;
    ahead.Bytes(limit, &bytes);
    const auto end = std::find(bytes.begin(), bytes.end(), '\n');
    if (end == bytes.end()) {
      return limit > PickleLimits::kGlobalBytes
                 ? OverPickleLimit("bytes in a global's name", PickleLimits::kGlobalBytes)
                 : Truncated();
    }
    *line = absl::string_view(reinterpret_cast<const char*>(bytes.data()), end - bytes.begin());
    reader_.Skip(line->size() + 1);
    return absl::OkStatus();
  }

  absl::Status Long1() {
    uint8_t size = 0;
    absl::Span<const uint8_t> bytes;
    if (!reader_.U8(&size)) return Truncated();
    if (size > 8) return absl::InvalidArgumentError(absl::StrCat("integer of ", size, " bytes, above the limit of 8"));
    if (!reader_.Bytes(size, &bytes)) return Truncated();
    uint64_t value = size > 0 && (bytes[size - 1] & 0x80) != 0 ? ~uint64_t{0} : 0;  // Two's complement.
    for (int i = size - 1; i >= 0; --i) value = (value << 8) | bytes[i];
    return builder_.Push(Kind::kInt, static_cast<int64_t>(value));
  }

  absl::Status SkipBytes(uint64_t count) {
    if (!reader_.Skip(count)) return Truncated();
    return builder_.Push(Kind::kOpaque);
  }

  // The opcode after so many others.
  absl::Status Step(int64_t opcodes) {
    if (opcodes >= PickleLimits::kOpcodes) return OverPickleLimit("opcodes", PickleLimits::kOpcodes);
    uint8_t opcode = 0;
    if (!reader_.U8(&opcode)) return Truncated();
    if (opcodes == 0 && opcode != kProto) return absl::InvalidArgumentError("does not start with PROTO");
    uint8_t u8 = 0;
    uint16_t u16 = 0;
    uint32_t u32 = 0;
    uint64_t u64 = 0;
    Value value;
    std::vector<Value> values;
    switch (opcode) {
      case kProto:
        if (opcodes != 0) return absl::InvalidArgumentError("PROTO inside the pickle");
        if (!reader_.U8(&u8)) return Truncated();
        if (u8 < 2 || u8 > 5) return absl::InvalidArgumentError(absl::StrCat("protocol ", u8, " is not supported"));
        return absl::OkStatus();
      case kFrame:
        if (!reader_.U64(&u64)) return Truncated();
        return u64 <= reader_.remaining() ? absl::OkStatus() : Truncated();
      case kStop:
        stopped_ = true;
        return builder_.Stop(&pickle_);
      case kMark:
        return builder_.Mark();

      case kNone:
        return builder_.Push(Kind::kNone);
      case kNewTrue:
        return builder_.Push(Kind::kBool, 1);
      case kNewFalse:
        return builder_.Push(Kind::kBool, 0);
      case kBinFloat:  // A trainer's learning rate, say. No tensor depends on one.
        if (!reader_.Skip(8)) return Truncated();
        return builder_.Push(Kind::kNone);
      case kBinInt:
        if (!reader_.U32(&u32)) return Truncated();
        return builder_.Push(Kind::kInt, static_cast<int32_t>(u32));
      case kBinInt1:
        if (!reader_.U8(&u8)) return Truncated();
        return builder_.Push(Kind::kInt, u8);
      case kBinInt2:
        if (!reader_.U16(&u16)) return Truncated();
        return builder_.Push(Kind::kInt, u16);
      case kLong1:
        return Long1();
      case kBinUnicode:
        if (!reader_.U32(&u32)) return Truncated();
        return ReadString(u32);
      case kShortBinUnicode:
        if (!reader_.U8(&u8)) return Truncated();
        return ReadString(u8);

      case kEmptyTuple:
        return builder_.PushTupleOf(0);
      case kTuple1:
        return builder_.PushTupleOf(1);
      case kTuple2:
        return builder_.PushTupleOf(2);
      case kTuple3:
        return builder_.PushTupleOf(3);
      case kTuple:
        RWKV_RETURN_IF_ERROR(builder_.PopToMark(&values));
        return builder_.PushSequence(Kind::kTuple, std::move(values));
      case kEmptyList:
        return builder_.PushSequence(Kind::kList, {});
      case kAppend:
        RWKV_RETURN_IF_ERROR(builder_.Pop(&value));
        return builder_.Append({value});
      case kAppends:
        RWKV_RETURN_IF_ERROR(builder_.PopToMark(&values));
        return builder_.Append(values);
      case kEmptyDict:
        return builder_.PushDict();
      case kSetItem:
        values.resize(2);
        RWKV_RETURN_IF_ERROR(builder_.Pop(&values[1]));
        RWKV_RETURN_IF_ERROR(builder_.Pop(&values[0]));
        return builder_.SetItems(values);
      case kSetItems:
        RWKV_RETURN_IF_ERROR(builder_.PopToMark(&values));
        return builder_.SetItems(values);

      case kBinPut:
        if (!reader_.U8(&u8)) return Truncated();
        return builder_.Put(u8);
      case kLongBinPut:
        if (!reader_.U32(&u32)) return Truncated();
        return builder_.Put(u32);
      case kMemoize:
        return builder_.Put(builder_.memo_size());
      case kBinGet:
        if (!reader_.U8(&u8)) return Truncated();
        return builder_.Get(u8);
      case kLongBinGet:
        if (!reader_.U32(&u32)) return Truncated();
        return builder_.Get(u32);

      case kGlobal: {
        absl::string_view module;
        absl::string_view name;
        RWKV_RETURN_IF_ERROR(ReadLine(&module));
        RWKV_RETURN_IF_ERROR(ReadLine(&name));
        return builder_.PushGlobal(module, name);
      }
      case kStackGlobal: {
        Value name;
        Value module;
        RWKV_RETURN_IF_ERROR(builder_.Pop(&name));
        RWKV_RETURN_IF_ERROR(builder_.Pop(&module));
        if (name.kind != Kind::kString || module.kind != Kind::kString)
          return absl::InvalidArgumentError("a global's name is not a string");
        return builder_.PushGlobal(builder_.AsString(module), builder_.AsString(name));
      }
      case kReduce:
        return builder_.Reduce();
      case kBuild:
        return builder_.Build();
      case kBinPersistentId:
        RWKV_RETURN_IF_ERROR(builder_.Pop(&value));
        return builder_.PushStorage(value);

      case kBinString:
        if (!reader_.U32(&u32)) return Truncated();
        return ReadString(u32);
      case kShortBinString:
        if (!reader_.U8(&u8)) return Truncated();
        return ReadString(u8);
      case kBinUnicode8:
        if (!reader_.U64(&u64)) return Truncated();
        return ReadString(u64);
      case kShortBinBytes:
        if (!reader_.U8(&u8)) return Truncated();
        return SkipBytes(u8);
      case kBinBytes:
      case kLong4:
        if (!reader_.U32(&u32)) return Truncated();
        return SkipBytes(u32);
      case kBinBytes8:
      case kByteArray8:
        if (!reader_.U64(&u64)) return Truncated();
        return SkipBytes(u64);
      case kEmptySet:
        return builder_.Push(Kind::kOpaque);
      case kAddItems:
        RWKV_RETURN_IF_ERROR(builder_.PopToMark(&values));
        return builder_.Top(Kind::kOpaque, "set", &value);
      case kFrozenSet:
        RWKV_RETURN_IF_ERROR(builder_.PopToMark(&values));
        return builder_.Push(Kind::kOpaque);
      case kNewObject:
        return builder_.NewObject(1);
      case kNewObjectEx:
        return builder_.NewObject(2);
      case kPop:
        return builder_.Pop(&value);
      case kPopMark:
        return builder_.PopToMark(&values);
      case kDup:
        return builder_.Duplicate();
      default:
        return absl::InvalidArgumentError(absl::StrFormat("refuses opcode 0x%02x", opcode));
    }
  }

  ByteReader reader_;
  bool stopped_ = false;
  PickleBuilder builder_;
  Pickle pickle_;  // Once stopped.
};

absl::StatusOr<Pickle> Pickle::Parse(absl::Span<const uint8_t> bytes) {
  // A longer one is cut, and then found to be over the limit or to end too soon.
  return PickleMachine(bytes.subspan(0, PickleLimits::kBytes)).Run();
}

absl::StatusOr<std::vector<std::pair<absl::string_view, const PickledTensor*>>> Pickle::StateDict() const {
  if (root_.kind != Kind::kDict) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the pickle's root is not a dict of tensors", opaque_.empty() ? "" : " but an object of ",
        opaque_.empty() ? "" : Quoted(opaque_[0]), opaque_.empty() ? "" : "; save the model's state_dict() instead"));
  }
  // Source: BlinkDL/ChatRWKV rwkv_pip_package/src/rwkv/model.py, convert_and_save_and_exit.
  for (const auto& [key, value] : Entries(root_)) {
    if (key.kind != Kind::kString || AsString(key) != "_strategy") continue;
    return absl::UnimplementedError(
        absl::StrCat("is already converted by the PyPI package rwkv, for strategy ",
                     value.kind == Kind::kString ? Quoted(AsString(value)) : "of another kind",
                     ": its matrices are transposed, scaled and perhaps quantized; give the original model"));
  }
  std::vector<std::pair<absl::string_view, const PickledTensor*>> tensors;
  const auto add = [&](const std::pair<Value, Value>& entry) {
    if (entry.first.kind != Kind::kString) return absl::InvalidArgumentError("a tensor's name is not a string");
    if (tensors.size() >= kMaxTensors) {
      return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxTensors, " named tensors"));
    }
    tensors.emplace_back(AsString(entry.first), &AsTensor(entry.second));
    return absl::OkStatus();
  };
  // Each inner dict once, however often the outer one names it.
  std::vector<bool> seen(dicts_.size(), false);
  seen[root_.payload] = true;
  for (const std::pair<Value, Value>& entry : Entries(root_)) {
    if (entry.second.kind == Kind::kTensor) RWKV_RETURN_IF_ERROR(add(entry));
    if (entry.second.kind != Kind::kDict || seen[entry.second.payload]) continue;
    seen[entry.second.payload] = true;
    for (const std::pair<Value, Value>& inner : Entries(entry.second)) {
      if (inner.second.kind == Kind::kTensor) RWKV_RETURN_IF_ERROR(add(inner));
    }
  }
  return tensors;
}

}  // namespace rwkv::checkpoint
