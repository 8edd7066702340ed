// The stack, the memo and the values of a pickle that is being read: what its opcodes do, without the bytes they come
// from. Every value costs at least one opcode, so the limit of those bounds the memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/pickle.h"

namespace rwkv::checkpoint {

absl::Status OverPickleLimit(absl::string_view what, int64_t limit);

// Errors are kInvalidArgument and do not say where: the reader knows. After one the builder is of no more use.
class PickleBuilder {
 public:
  using Kind = Pickle::Kind;
  using Value = Pickle::Value;

  absl::Status Push(Value value);
  absl::Status Push(Kind kind, int64_t payload = 0) { return Push(Value{kind, payload}); }
  absl::Status PushString(absl::string_view text);
  absl::Status PushSequence(Kind kind, std::vector<Value> items);
  absl::Status PushTupleOf(int count);  // Of the newest values.
  absl::Status PushDict();
  absl::Status PushGlobal(absl::string_view module, absl::string_view name);
  absl::Status PushStorage(Value id);
  absl::Status Duplicate();

  absl::Status Mark();
  absl::Status Pop(Value* value);
  absl::Status PopToMark(std::vector<Value>* values);  // Everything above the newest mark, and the mark.
  // The value under those just popped, which stays on the stack.
  absl::Status Top(Kind kind, absl::string_view what, Value* value) const;

  absl::Status Put(uint32_t index);
  absl::Status Get(uint32_t index);
  uint32_t memo_size() const { return static_cast<uint32_t>(memo_.size()); }

  absl::Status SetItems(const std::vector<Value>& values);
  absl::Status Append(const std::vector<Value>& values);
  absl::Status Reduce();
  // Attributes of an OrderedDict (a module's _metadata: version numbers) or an opaque object are not kept.
  absl::Status Build();
  absl::Status NewObject(int arguments);  // Of a class, from as many values as the opcode takes besides.

  absl::string_view AsString(Value value) const { return pickle_.AsString(value); }
  absl::Status Stop(Pickle* pickle);  // With one value, the root.

 private:
  // Where the values above the newest mark begin. What lies below may not be popped.
  size_t Floor() const { return marks_.empty() ? 0 : marks_.back(); }
  bool OpaqueIsOnTop() const { return stack_.size() > Floor() && stack_.back().kind == Kind::kOpaque; }
  absl::Status ReadSizes(Value value, absl::string_view what, std::vector<int64_t>* sizes) const;
  absl::Status PushTensor(absl::Span<const Value> arguments);

  Pickle pickle_;
  std::vector<Value> stack_;
  std::vector<size_t> marks_;  // Stack heights.
  absl::flat_hash_map<uint32_t, Value> memo_;
  absl::flat_hash_map<std::string, int> storage_index_;
};

}  // namespace rwkv::checkpoint
