#include "services/checkpoint/formats/pickle_builder.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/pickle_globals.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

absl::Status OverPickleLimit(absl::string_view what, int64_t limit) {
  return absl::InvalidArgumentError(absl::StrCat("more ", what, " than the limit of ", limit));
}

absl::Status PickleBuilder::Stop(Pickle* pickle) {
  RWKV_RETURN_IF_ERROR(Pop(&pickle_.root_));
  if (!stack_.empty() || !marks_.empty()) {
    return absl::InvalidArgumentError("stops with more than one value on the stack");
  }
  *pickle = std::move(pickle_);
  return absl::OkStatus();
}

absl::Status PickleBuilder::Mark() {
  if (marks_.size() >= static_cast<size_t>(PickleLimits::kMarkDepth)) {
    return OverPickleLimit("nested marks", PickleLimits::kMarkDepth);
  }
  marks_.push_back(stack_.size());
  return absl::OkStatus();
}

absl::Status PickleBuilder::PushString(absl::string_view text) {
  pickle_.strings_.push_back(text);
  return Push(Kind::kString, static_cast<int64_t>(pickle_.strings_.size()) - 1);
}

absl::Status PickleBuilder::Duplicate() {
  if (stack_.size() <= Floor()) return absl::InvalidArgumentError("takes a value from an empty stack");
  return Push(Value(stack_.back()));
}

absl::Status PickleBuilder::Push(Value value) {
  if (stack_.size() >= static_cast<size_t>(PickleLimits::kStackDepth)) {
    return OverPickleLimit("values on the stack", PickleLimits::kStackDepth);
  }
  stack_.push_back(value);
  return absl::OkStatus();
}
absl::Status PickleBuilder::Pop(Value* value) {
  if (stack_.size() <= Floor()) return absl::InvalidArgumentError("takes a value from an empty stack");
  *value = stack_.back();
  stack_.pop_back();
  return absl::OkStatus();
}

// Everything above the newest mark, and the mark.
absl::Status PickleBuilder::PopToMark(std::vector<Value>* values) {
  if (marks_.empty()) return absl::InvalidArgumentError("needs a mark that is not there");
  values->assign(stack_.begin() + marks_.back(), stack_.end());
  stack_.resize(marks_.back());
  marks_.pop_back();
  return absl::OkStatus();
}

// The value under those just popped, which stays on the stack.
absl::Status PickleBuilder::Top(Kind kind, absl::string_view what, Value* value) const {
  if (stack_.size() <= Floor() || stack_.back().kind != kind)
    return absl::InvalidArgumentError(absl::StrCat("needs a ", what, " on the stack"));
  *value = stack_.back();
  return absl::OkStatus();
}

absl::Status PickleBuilder::PushSequence(Kind kind, std::vector<Value> items) {
  pickle_.sequences_.push_back(std::move(items));
  return Push(kind, static_cast<int64_t>(pickle_.sequences_.size()) - 1);
}

absl::Status PickleBuilder::PushTupleOf(int count) {
  std::vector<Value> items(count);
  for (int i = count - 1; i >= 0; --i) RWKV_RETURN_IF_ERROR(Pop(&items[i]));
  return PushSequence(Kind::kTuple, std::move(items));
}

absl::Status PickleBuilder::PushDict() {
  pickle_.dicts_.emplace_back();
  return Push(Kind::kDict, static_cast<int64_t>(pickle_.dicts_.size()) - 1);
}

absl::Status PickleBuilder::PushGlobal(absl::string_view module, absl::string_view name) {
  const int known = FindKnownGlobal(module, name);
  if (known >= 0) return Push(Kind::kGlobal, known);
  std::string full = absl::StrCat(module, " ", name);
  if (IsHostile(module, name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("refuses global ", Quoted(full), ": a checkpoint may hold data only"));
  }
  std::vector<std::string>& opaque = pickle_.opaque_;
  if (opaque.size() < Pickle::kMaxOpaque && std::find(opaque.begin(), opaque.end(), full) == opaque.end()) {
    opaque.push_back(std::move(full));
  }
  return Push(Kind::kOpaque);
}

absl::Status PickleBuilder::Put(uint32_t index) {
  if (stack_.size() <= Floor()) return absl::InvalidArgumentError("memoizes a value from an empty stack");
  if (memo_.size() >= static_cast<size_t>(PickleLimits::kMemoEntries)) {
    return OverPickleLimit("memo entries", PickleLimits::kMemoEntries);
  }
  memo_[index] = stack_.back();
  return absl::OkStatus();
}

absl::Status PickleBuilder::Get(uint32_t index) {
  const auto found = memo_.find(index);
  if (found == memo_.end())
    return absl::InvalidArgumentError(absl::StrCat("uses memo entry ", index, ", which was never stored"));
  return Push(found->second);
}

absl::Status PickleBuilder::SetItems(const std::vector<Value>& values) {
  if (values.size() % 2 != 0) return absl::InvalidArgumentError("sets a dict item without a value");
  if (OpaqueIsOnTop()) return absl::OkStatus();
  Value dict;
  RWKV_RETURN_IF_ERROR(Top(Kind::kDict, "dict", &dict));
  auto& entries = pickle_.dicts_[dict.payload];
  for (size_t i = 0; i < values.size(); i += 2) entries.emplace_back(values[i], values[i + 1]);
  return absl::OkStatus();
}

absl::Status PickleBuilder::Append(const std::vector<Value>& values) {
  if (OpaqueIsOnTop()) return absl::OkStatus();
  Value list;
  RWKV_RETURN_IF_ERROR(Top(Kind::kList, "list", &list));
  auto& items = pickle_.sequences_[list.payload];
  items.insert(items.end(), values.begin(), values.end());
  return absl::OkStatus();
}

// ('storage', <storage class>, '<key>', '<device>', <element count>[, None])
absl::Status PickleBuilder::PushStorage(Value id) {
  if (id.kind != Kind::kTuple) return absl::InvalidArgumentError("persistent id is not a tuple");
  const absl::Span<const Value> items = pickle_.Items(id);
  if (items.size() < 5 || items.size() > 6 || items[0].kind != Kind::kString ||
      pickle_.AsString(items[0]) != "storage" || items[1].kind != Kind::kGlobal ||
      KnownGlobalAt(static_cast<int>(items[1].payload)).constructor != Constructor::kStorage ||
      items[2].kind != Kind::kString || items[3].kind != Kind::kString || items[4].kind != Kind::kInt) {
    return absl::InvalidArgumentError("persistent id is not that of a storage");
  }
  if (items.size() == 6 && items[5].kind != Kind::kNone)
    return absl::InvalidArgumentError("views of storages are not supported");
  PickledStorage storage;
  storage.key = std::string(pickle_.AsString(items[2]));
  storage.type = KnownGlobalAt(static_cast<int>(items[1].payload)).type;
  storage.elements = items[4].payload;
  if (storage.key.size() > 64) return absl::InvalidArgumentError("storage key is longer than 64 bytes");
  if (storage.elements < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("storage ", Quoted(storage.key), " has ", storage.elements, " elements"));
  }
  const auto [known, is_new] = storage_index_.emplace(storage.key, static_cast<int>(pickle_.storages_.size()));
  if (is_new) {
    if (pickle_.storages_.size() >= kMaxTensors) return OverPickleLimit("storages", kMaxTensors);
    pickle_.storages_.push_back(std::move(storage));
  } else {
    const PickledStorage& first = pickle_.storages_[known->second];
    if (first.type != storage.type || first.elements != storage.elements) {
      return absl::InvalidArgumentError(absl::StrCat("storage ", Quoted(storage.key), " is ", storage.elements, " of ",
                                                     ElementTypeName(storage.type), " here and ", first.elements,
                                                     " of ", ElementTypeName(first.type), " before"));
    }
  }
  return Push(Kind::kStorage, known->second);
}

absl::Status PickleBuilder::ReadSizes(Value value, absl::string_view what, std::vector<int64_t>* sizes) const {
  if (value.kind != Kind::kTuple)
    return absl::InvalidArgumentError(absl::StrCat("the ", what, " of a tensor is not a tuple"));
  const absl::Span<const Value> items = pickle_.Items(value);
  if (items.size() > kMaxTensorRank) {
    return absl::InvalidArgumentError(
        absl::StrCat("a tensor of ", items.size(), " dimensions, above the limit of ", kMaxTensorRank));
  }
  for (const Value& item : items) {
    if (item.kind != Kind::kInt)
      return absl::InvalidArgumentError(absl::StrCat("the ", what, " of a tensor is not made of integers"));
    sizes->push_back(item.payload);
  }
  return absl::OkStatus();
}

// (storage, offset, size, stride[, requires_grad, hooks[, metadata]])
absl::Status PickleBuilder::PushTensor(absl::Span<const Value> arguments) {
  if (arguments[0].kind != Kind::kStorage || arguments[1].kind != Kind::kInt) {
    return absl::InvalidArgumentError("a tensor is rebuilt from something else than a storage and an offset");
  }
  if (pickle_.tensors_.size() >= kMaxTensors) return OverPickleLimit("tensors", kMaxTensors);
  PickledTensor tensor;
  tensor.storage = static_cast<int>(arguments[0].payload);
  tensor.offset = arguments[1].payload;
  RWKV_RETURN_IF_ERROR(ReadSizes(arguments[2], "shape", &tensor.shape));
  RWKV_RETURN_IF_ERROR(ReadSizes(arguments[3], "stride", &tensor.strides));
  pickle_.tensors_.push_back(std::move(tensor));
  return Push(Kind::kTensor, static_cast<int64_t>(pickle_.tensors_.size()) - 1);
}

absl::Status PickleBuilder::Reduce() {
  Value arguments;
  Value callee;
  RWKV_RETURN_IF_ERROR(Pop(&arguments));
  RWKV_RETURN_IF_ERROR(Pop(&callee));
  if (callee.kind == Kind::kOpaque && arguments.kind == Kind::kTuple) return Push(Kind::kOpaque);
  if (callee.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) {
    return absl::InvalidArgumentError("calls something that is not a known constructor");
  }
  const KnownGlobal& global = KnownGlobalAt(static_cast<int>(callee.payload));
  const absl::Span<const Value> items = pickle_.Items(arguments);
  const auto wrong_count = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("calls ", global.module, ".", global.name, " with ", items.size(), " arguments"));
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
      return items[0].kind == Kind::kTensor
                 ? Push(items[0])
                 : absl::InvalidArgumentError("a parameter is made of something else than a tensor");
    case Constructor::kStorage:
      break;
  }
  return absl::InvalidArgumentError(absl::StrCat("calls ", global.module, ".", global.name, ", which is a type"));
}

// Attributes of an OrderedDict (a module's _metadata: version numbers) or an opaque object are not kept.
absl::Status PickleBuilder::Build() {
  Value attributes;
  RWKV_RETURN_IF_ERROR(Pop(&attributes));
  if (OpaqueIsOnTop()) return absl::OkStatus();
  Value dict;
  return Top(Kind::kDict, "dict", &dict);
}

// Of a class, from as many values as the opcode takes besides.
absl::Status PickleBuilder::NewObject(int arguments) {
  Value value;
  for (int i = 0; i < arguments; ++i) RWKV_RETURN_IF_ERROR(Pop(&value));
  RWKV_RETURN_IF_ERROR(Pop(&value));
  return value.kind == Kind::kOpaque ? Push(Kind::kOpaque)
                                     : absl::InvalidArgumentError("makes an object of something else than a class");
}

}  // namespace rwkv::checkpoint
