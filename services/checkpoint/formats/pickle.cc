#include "services/checkpoint/formats/pickle.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/byte_reader.h"
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

// Packages whose names only stand in a pickle to run something.
constexpr absl::string_view kHostile[] = {
    "os",        "posix",       "nt",        "subprocess",      "sys",
    "importlib", "runpy",       "shutil",    "socket",          "ctypes",
    "pty",       "code",        "codeop",    "commands",        "operator",
    "pickle",    "_pickle",     "marshal",   "types",           "timeit",
    "pip",       "webbrowser",  "asyncio",   "signal",          "imp",
    "builtins",  "__builtin__", "threading", "multiprocessing", "http",
    "urllib",    "requests",    "ssl",       "tempfile",        "bdb",
};
// But for these.
constexpr absl::string_view kHarmlessBuiltins[] = {"set",     "frozenset", "list",      "dict",  "tuple",
                                                   "complex", "bytes",     "bytearray", "slice", "range",
                                                   "int",     "float",     "bool",      "str",   "object"};

template <size_t kCount>
bool IsAnyOf(absl::string_view text, const absl::string_view (&list)[kCount]) {
  return std::find(std::begin(list), std::end(list), text) != std::end(list);
}

bool IsHostile(absl::string_view module, absl::string_view name) {
  // A dunder name reaches through an object to what it was made with.
  if (name.find("__") != absl::string_view::npos) return true;
  const absl::string_view package = module.substr(0, module.find('.'));
  if ((package == "builtins" || package == "__builtin__") && IsAnyOf(name, kHarmlessBuiltins)) return false;
  return IsAnyOf(package, kHostile);
}

enum class Constructor { kOrderedDict, kRebuildTensor, kRebuildTensorV2, kRebuildParameter, kStorage };

struct KnownGlobal {
  absl::string_view module;
  absl::string_view name;
  Constructor constructor;
  ElementType type = ElementType::kFloat32;  // kStorage
};

// A global Value's payload is an index into this table.
constexpr KnownGlobal kGlobals[] = {
    {"collections", "OrderedDict", Constructor::kOrderedDict},
    {"torch._utils", "_rebuild_tensor", Constructor::kRebuildTensor},
    {"torch._utils", "_rebuild_tensor_v2", Constructor::kRebuildTensorV2},
    {"torch._utils", "_rebuild_parameter", Constructor::kRebuildParameter},
    {"torch", "FloatStorage", Constructor::kStorage, ElementType::kFloat32},
    {"torch", "HalfStorage", Constructor::kStorage, ElementType::kFloat16},
    {"torch", "BFloat16Storage", Constructor::kStorage, ElementType::kBFloat16},
    {"torch", "DoubleStorage", Constructor::kStorage, ElementType::kFloat64},
    {"torch", "LongStorage", Constructor::kStorage, ElementType::kInt64},
    {"torch", "IntStorage", Constructor::kStorage, ElementType::kInt32},
    {"torch", "ShortStorage", Constructor::kStorage, ElementType::kInt16},
    {"torch", "CharStorage", Constructor::kStorage, ElementType::kInt8},
    {"torch", "ByteStorage", Constructor::kStorage, ElementType::kUint8},
    {"torch", "BoolStorage", Constructor::kStorage, ElementType::kBool},
};

}  // namespace

// The stack machine. Every value it makes costs at least one opcode, so the opcode limit bounds its memory.
class PickleMachine {
 public:
  explicit PickleMachine(absl::Span<const uint8_t> bytes) : reader_(bytes) {}

  absl::StatusOr<Pickle> Run() {
    for (int64_t opcodes = 0; !stopped_; ++opcodes) {
      at_ = reader_.position();
      if (opcodes >= PickleLimits::kOpcodes) return OverLimit("opcodes", PickleLimits::kOpcodes);
      uint8_t opcode = 0;
      if (!reader_.U8(&opcode)) return Truncated();
      if (opcodes == 0 && opcode != kProto) return Bad("does not start with PROTO");
      RWKV_RETURN_IF_ERROR(Step(opcode));
    }
    pickle_.size_bytes_ = static_cast<int64_t>(reader_.position());
    return std::move(pickle_);
  }

 private:
  absl::Status Bad(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("pickle, byte ", at_, ": ", what));
  }
  absl::Status Truncated() const {
    return absl::DataLossError(absl::StrCat("pickle, byte ", at_, ": the data ends inside the pickle"));
  }
  absl::Status OverLimit(absl::string_view what, int64_t limit) const {
    return Bad(absl::StrCat("more ", what, " than the limit of ", limit));
  }

  absl::Status Push(Value value) {
    if (stack_.size() >= static_cast<size_t>(PickleLimits::kStackDepth)) {
      return OverLimit("values on the stack", PickleLimits::kStackDepth);
    }
    stack_.push_back(value);
    return absl::OkStatus();
  }
  absl::Status Push(Kind kind, int64_t payload = 0) { return Push(Value{kind, payload}); }

  // Where the values above the newest mark begin. What lies below may not be popped.
  size_t Floor() const { return marks_.empty() ? 0 : marks_.back(); }

  absl::Status Pop(Value* value) {
    if (stack_.size() <= Floor()) return Bad("takes a value from an empty stack");
    *value = stack_.back();
    stack_.pop_back();
    return absl::OkStatus();
  }

  // Everything above the newest mark, and the mark.
  absl::Status PopToMark(std::vector<Value>* values) {
    if (marks_.empty()) return Bad("needs a mark that is not there");
    values->assign(stack_.begin() + marks_.back(), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return absl::OkStatus();
  }

  // The value under those just popped, which stays on the stack.
  absl::Status Top(Kind kind, absl::string_view what, Value* value) const {
    if (stack_.size() <= Floor() || stack_.back().kind != kind)
      return Bad(absl::StrCat("needs a ", what, " on the stack"));
    *value = stack_.back();
    return absl::OkStatus();
  }

  absl::Status PushString(uint64_t length) {
    if (length > static_cast<uint64_t>(PickleLimits::kStringBytes)) {
      return Bad(absl::StrCat("string of ", length, " bytes, above the limit of ", PickleLimits::kStringBytes));
    }
    absl::Span<const uint8_t> bytes;
    if (!reader_.Bytes(length, &bytes)) return Truncated();
    pickle_.strings_.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return Push(Kind::kString, static_cast<int64_t>(pickle_.strings_.size()) - 1);
  }

  absl::Status PushSequence(Kind kind, std::vector<Value> items) {
    pickle_.sequences_.push_back(std::move(items));
    return Push(kind, static_cast<int64_t>(pickle_.sequences_.size()) - 1);
  }

  absl::Status PushTupleOf(int count) {
    std::vector<Value> items(count);
    for (int i = count - 1; i >= 0; --i) RWKV_RETURN_IF_ERROR(Pop(&items[i]));
    return PushSequence(Kind::kTuple, std::move(items));
  }

  absl::Status PushDict() {
    pickle_.dicts_.emplace_back();
    return Push(Kind::kDict, static_cast<int64_t>(pickle_.dicts_.size()) - 1);
  }

  absl::Status PushGlobal(absl::string_view module, absl::string_view name) {
    for (size_t i = 0; i < std::size(kGlobals); ++i) {
      if (kGlobals[i].module == module && kGlobals[i].name == name) {
        return Push(Kind::kGlobal, static_cast<int64_t>(i));
      }
    }
    std::string full = absl::StrCat(module, " ", name);
    if (IsHostile(module, name)) {
      return Bad(absl::StrCat("refuses global ", Quoted(full), ": a checkpoint may hold data only"));
    }
    std::vector<std::string>& opaque = pickle_.opaque_;
    if (opaque.size() < Pickle::kMaxOpaque && std::find(opaque.begin(), opaque.end(), full) == opaque.end()) {
      opaque.push_back(std::move(full));
    }
    return Push(Kind::kOpaque);
  }

  absl::Status ReadLine(absl::string_view* line) {
    const uint64_t limit = std::min<uint64_t>(reader_.remaining(), PickleLimits::kGlobalBytes + 1);
    ByteReader ahead = reader_;
    absl::Span<const uint8_t> bytes;
    ahead.Bytes(limit, &bytes);
    const auto end = std::find(bytes.begin(), bytes.end(), '\n');
    if (end == bytes.end()) {
      return limit > PickleLimits::kGlobalBytes ? OverLimit("bytes in a global's name", PickleLimits::kGlobalBytes)
                                                : Truncated();
    }
    *line = absl::string_view(reinterpret_cast<const char*>(bytes.data()), end - bytes.begin());
    reader_.Skip(line->size() + 1);
    return absl::OkStatus();
  }

  absl::Status Put(uint32_t index) {
    if (stack_.size() <= Floor()) return Bad("memoizes a value from an empty stack");
    if (memo_.size() >= static_cast<size_t>(PickleLimits::kMemoEntries)) {
      return OverLimit("memo entries", PickleLimits::kMemoEntries);
    }
    memo_[index] = stack_.back();
    return absl::OkStatus();
  }

  absl::Status Get(uint32_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) return Bad(absl::StrCat("uses memo entry ", index, ", which was never stored"));
    return Push(found->second);
  }

  bool OpaqueIsOnTop() const { return stack_.size() > Floor() && stack_.back().kind == Kind::kOpaque; }

  absl::Status SetItems(const std::vector<Value>& values) {
    if (values.size() % 2 != 0) return Bad("sets a dict item without a value");
    if (OpaqueIsOnTop()) return absl::OkStatus();
    Value dict;
    RWKV_RETURN_IF_ERROR(Top(Kind::kDict, "dict", &dict));
    auto& entries = pickle_.dicts_[dict.payload];
    for (size_t i = 0; i < values.size(); i += 2) entries.emplace_back(values[i], values[i + 1]);
    return absl::OkStatus();
  }

  absl::Status Append(const std::vector<Value>& values) {
    if (OpaqueIsOnTop()) return absl::OkStatus();
    Value list;
    RWKV_RETURN_IF_ERROR(Top(Kind::kList, "list", &list));
    auto& items = pickle_.sequences_[list.payload];
    items.insert(items.end(), values.begin(), values.end());
    return absl::OkStatus();
  }

  // ('storage', <storage class>, '<key>', '<device>', <element count>[, None])
  absl::Status PushStorage(Value id) {
    if (id.kind != Kind::kTuple) return Bad("persistent id is not a tuple");
    const absl::Span<const Value> items = pickle_.Items(id);
    if (items.size() < 5 || items.size() > 6 || items[0].kind != Kind::kString ||
        pickle_.AsString(items[0]) != "storage" || items[1].kind != Kind::kGlobal ||
        kGlobals[items[1].payload].constructor != Constructor::kStorage || items[2].kind != Kind::kString ||
        items[3].kind != Kind::kString || items[4].kind != Kind::kInt) {
      return Bad("persistent id is not that of a storage");
    }
    if (items.size() == 6 && items[5].kind != Kind::kNone) return Bad("views of storages are not supported");
    PickledStorage storage;
    storage.key = std::string(pickle_.AsString(items[2]));
    storage.type = kGlobals[items[1].payload].type;
    storage.elements = items[4].payload;
    if (storage.key.size() > 64) return Bad("storage key is longer than 64 bytes");
    if (storage.elements < 0) {
      return Bad(absl::StrCat("storage ", Quoted(storage.key), " has ", storage.elements, " elements"));
    }
    const auto [known, is_new] = storage_index_.emplace(storage.key, static_cast<int>(pickle_.storages_.size()));
    if (is_new) {
      if (pickle_.storages_.size() >= kMaxTensors) return OverLimit("storages", kMaxTensors);
      pickle_.storages_.push_back(std::move(storage));
    } else {
      const PickledStorage& first = pickle_.storages_[known->second];
      if (first.type != storage.type || first.elements != storage.elements) {
        return Bad(absl::StrCat("storage ", Quoted(storage.key), " is ", storage.elements, " of ",
                                ElementTypeName(storage.type), " here and ", first.elements, " of ",
                                ElementTypeName(first.type), " before"));
      }
    }
    return Push(Kind::kStorage, known->second);
  }

  absl::Status ReadSizes(Value value, absl::string_view what, std::vector<int64_t>* sizes) const {
    if (value.kind != Kind::kTuple) return Bad(absl::StrCat("the ", what, " of a tensor is not a tuple"));
    const absl::Span<const Value> items = pickle_.Items(value);
    if (items.size() > kMaxTensorRank) {
      return Bad(absl::StrCat("a tensor of ", items.size(), " dimensions, above the limit of ", kMaxTensorRank));
    }
    for (const Value& item : items) {
      if (item.kind != Kind::kInt) return Bad(absl::StrCat("the ", what, " of a tensor is not made of integers"));
      sizes->push_back(item.payload);
    }
    return absl::OkStatus();
  }

  // (storage, offset, size, stride[, requires_grad, hooks[, metadata]])
  absl::Status PushTensor(absl::Span<const Value> arguments) {
    if (arguments[0].kind != Kind::kStorage || arguments[1].kind != Kind::kInt) {
      return Bad("a tensor is rebuilt from something else than a storage and an offset");
    }
    if (pickle_.tensors_.size() >= kMaxTensors) return OverLimit("tensors", kMaxTensors);
    PickledTensor tensor;
    tensor.storage = static_cast<int>(arguments[0].payload);
    tensor.offset = arguments[1].payload;
    RWKV_RETURN_IF_ERROR(ReadSizes(arguments[2], "shape", &tensor.shape));
    RWKV_RETURN_IF_ERROR(ReadSizes(arguments[3], "stride", &tensor.strides));
    pickle_.tensors_.push_back(std::move(tensor));
    return Push(Kind::kTensor, static_cast<int64_t>(pickle_.tensors_.size()) - 1);
  }

  absl::Status Reduce() {
    Value arguments;
    Value callee;
    RWKV_RETURN_IF_ERROR(Pop(&arguments));
    RWKV_RETURN_IF_ERROR(Pop(&callee));
    if (callee.kind == Kind::kOpaque && arguments.kind == Kind::kTuple) return Push(Kind::kOpaque);
    if (callee.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) {
      return Bad("calls something that is not a known constructor");
    }
    const KnownGlobal& global = kGlobals[callee.payload];
    const absl::Span<const Value> items = pickle_.Items(arguments);
    const auto wrong_count = [&] {
      return Bad(absl::StrCat("calls ", global.module, ".", global.name, " with ", items.size(), " arguments"));
    };
    switch (global.constructor) {
      case Constructor::kOrderedDict:
        return items.empty() ? PushDict() : wrong_count();
      case Constructor::kRebuildTensor:
        return items.size() == 4 ? PushTensor(items) : wrong_count();
      case Constructor::kRebuildTensorV2:
        return items.size() == 6 || items.size() == 7 ? PushTensor(items) : wrong_count();
      case Constructor::kRebuildParameter:
        if (items.size() != 3) return wrong_count();
        return items[0].kind == Kind::kTensor ? Push(items[0])
                                              : Bad("a parameter is made of something else than a tensor");
      case Constructor::kStorage:
        break;
    }
    return Bad(absl::StrCat("calls ", global.module, ".", global.name, ", which is a type"));
  }

  // Attributes of an OrderedDict (a module's _metadata: version numbers) or an opaque object are not kept.
  absl::Status Build() {
    Value attributes;
    RWKV_RETURN_IF_ERROR(Pop(&attributes));
    if (OpaqueIsOnTop()) return absl::OkStatus();
    Value dict;
    return Top(Kind::kDict, "dict", &dict);
  }

  absl::Status Long1() {
    uint8_t size = 0;
    absl::Span<const uint8_t> bytes;
    if (!reader_.U8(&size)) return Truncated();
    if (size > 8) return Bad(absl::StrCat("integer of ", size, " bytes, above the limit of 8"));
    if (!reader_.Bytes(size, &bytes)) return Truncated();
    uint64_t value = size > 0 && (bytes[size - 1] & 0x80) != 0 ? ~uint64_t{0} : 0;  // Two's complement.
    for (int i = size - 1; i >= 0; --i) value = (value << 8) | bytes[i];
    return Push(Kind::kInt, static_cast<int64_t>(value));
  }

  // Of a class, from as many values as the opcode takes besides.
  absl::Status NewObject(int arguments) {
    Value value;
    for (int i = 0; i < arguments; ++i) RWKV_RETURN_IF_ERROR(Pop(&value));
    RWKV_RETURN_IF_ERROR(Pop(&value));
    return value.kind == Kind::kOpaque ? Push(Kind::kOpaque) : Bad("makes an object of something else than a class");
  }

  absl::Status SkipBytes(uint64_t count) {
    if (!reader_.Skip(count)) return Truncated();
    return Push(Kind::kOpaque);
  }

  absl::Status Step(uint8_t opcode) {
    uint8_t u8 = 0;
    uint16_t u16 = 0;
    uint32_t u32 = 0;
    uint64_t u64 = 0;
    Value value;
    std::vector<Value> values;
    switch (opcode) {
      case kProto:
        if (at_ != 0) return Bad("PROTO inside the pickle");
        if (!reader_.U8(&u8)) return Truncated();
        if (u8 < 2 || u8 > 5) return Bad(absl::StrCat("protocol ", u8, " is not supported"));
        return absl::OkStatus();
      case kFrame:
        if (!reader_.U64(&u64)) return Truncated();
        return u64 <= reader_.remaining() ? absl::OkStatus() : Truncated();
      case kStop:
        RWKV_RETURN_IF_ERROR(Pop(&pickle_.root_));
        if (!stack_.empty() || !marks_.empty()) return Bad("stops with more than one value on the stack");
        stopped_ = true;
        return absl::OkStatus();
      case kMark:
        if (marks_.size() >= static_cast<size_t>(PickleLimits::kMarkDepth)) {
          return OverLimit("nested marks", PickleLimits::kMarkDepth);
        }
        marks_.push_back(stack_.size());
        return absl::OkStatus();

      case kNone:
        return Push(Kind::kNone);
      case kNewTrue:
        return Push(Kind::kBool, 1);
      case kNewFalse:
        return Push(Kind::kBool, 0);
      case kBinFloat:  // A trainer's learning rate, say. No tensor depends on one.
        if (!reader_.Skip(8)) return Truncated();
        return Push(Kind::kNone);
      case kBinInt:
        if (!reader_.U32(&u32)) return Truncated();
        return Push(Kind::kInt, static_cast<int32_t>(u32));
      case kBinInt1:
        if (!reader_.U8(&u8)) return Truncated();
        return Push(Kind::kInt, u8);
      case kBinInt2:
        if (!reader_.U16(&u16)) return Truncated();
        return Push(Kind::kInt, u16);
      case kLong1:
        return Long1();
      case kBinUnicode:
        if (!reader_.U32(&u32)) return Truncated();
        return PushString(u32);
      case kShortBinUnicode:
        if (!reader_.U8(&u8)) return Truncated();
        return PushString(u8);

      case kEmptyTuple:
        return PushTupleOf(0);
      case kTuple1:
        return PushTupleOf(1);
      case kTuple2:
        return PushTupleOf(2);
      case kTuple3:
        return PushTupleOf(3);
      case kTuple:
        RWKV_RETURN_IF_ERROR(PopToMark(&values));
        return PushSequence(Kind::kTuple, std::move(values));
      case kEmptyList:
        return PushSequence(Kind::kList, {});
      case kAppend:
        RWKV_RETURN_IF_ERROR(Pop(&value));
        return Append({value});
      case kAppends:
        RWKV_RETURN_IF_ERROR(PopToMark(&values));
        return Append(values);
      case kEmptyDict:
        return PushDict();
      case kSetItem:
        values.resize(2);
        RWKV_RETURN_IF_ERROR(Pop(&values[1]));
        RWKV_RETURN_IF_ERROR(Pop(&values[0]));
        return SetItems(values);
      case kSetItems:
        RWKV_RETURN_IF_ERROR(PopToMark(&values));
        return SetItems(values);

      case kBinPut:
        if (!reader_.U8(&u8)) return Truncated();
        return Put(u8);
      case kLongBinPut:
        if (!reader_.U32(&u32)) return Truncated();
        return Put(u32);
      case kMemoize:
        return Put(static_cast<uint32_t>(memo_.size()));
      case kBinGet:
        if (!reader_.U8(&u8)) return Truncated();
        return Get(u8);
      case kLongBinGet:
        if (!reader_.U32(&u32)) return Truncated();
        return Get(u32);

      case kGlobal: {
        absl::string_view module;
        absl::string_view name;
        RWKV_RETURN_IF_ERROR(ReadLine(&module));
        RWKV_RETURN_IF_ERROR(ReadLine(&name));
        return PushGlobal(module, name);
      }
      case kStackGlobal: {
        Value name;
        Value module;
        RWKV_RETURN_IF_ERROR(Pop(&name));
        RWKV_RETURN_IF_ERROR(Pop(&module));
        if (name.kind != Kind::kString || module.kind != Kind::kString) return Bad("a global's name is not a string");
        return PushGlobal(pickle_.AsString(module), pickle_.AsString(name));
      }
      case kReduce:
        return Reduce();
      case kBuild:
        return Build();
      case kBinPersistentId:
        RWKV_RETURN_IF_ERROR(Pop(&value));
        return PushStorage(value);

      case kBinString:
        if (!reader_.U32(&u32)) return Truncated();
        return PushString(u32);
      case kShortBinString:
        if (!reader_.U8(&u8)) return Truncated();
        return PushString(u8);
      case kBinUnicode8:
        if (!reader_.U64(&u64)) return Truncated();
        return PushString(u64);
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
        return Push(Kind::kOpaque);
      case kAddItems:
        RWKV_RETURN_IF_ERROR(PopToMark(&values));
        return Top(Kind::kOpaque, "set", &value);
      case kFrozenSet:
        RWKV_RETURN_IF_ERROR(PopToMark(&values));
        return Push(Kind::kOpaque);
      case kNewObject:
        return NewObject(1);
      case kNewObjectEx:
        return NewObject(2);
      case kPop:
        return Pop(&value);
      case kPopMark:
        return PopToMark(&values);
      case kDup:
        if (stack_.size() <= Floor()) return Bad("takes a value from an empty stack");
        return Push(Value(stack_.back()));
      default:
        return Bad(absl::StrFormat("refuses opcode 0x%02x", opcode));
    }
  }

  ByteReader reader_;
  uint64_t at_ = 0;  // Of the current opcode.
  bool stopped_ = false;
  Pickle pickle_;
  std::vector<Value> stack_;
  std::vector<size_t> marks_;  // Stack heights.
  absl::flat_hash_map<uint32_t, Value> memo_;
  absl::flat_hash_map<std::string, int> storage_index_;
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
