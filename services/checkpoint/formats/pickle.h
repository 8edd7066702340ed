// Reads the pickles of PyTorch checkpoints as data. Nothing is ever looked up or called: the handful of globals that a
// state dict needs are constructors known here by name. An object of any other class, as trainers leave them beside the
// tensors (settings, an optimizer's state), is not made: it becomes an opaque value, and its class is noted. What could
// only stand there to run something (os, subprocess, eval, ...) is refused by name.
//
// Opcodes (protocol 2, and 4's spellings of the same):
//   PROTO FRAME STOP MARK, NONE NEWTRUE NEWFALSE BINFLOAT (its value is dropped) BININT BININT1 BININT2 LONG1
//   LONG4 BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
//   BYTEARRAY8, EMPTY_SET ADDITEMS FROZENSET NEWOBJ NEWOBJ_EX (opaque), POP POP_MARK DUP, EMPTY_TUPLE TUPLE TUPLE1
//   TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS, BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET,
//   GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID.
// Globals: collections OrderedDict; torch._utils _rebuild_tensor, _rebuild_tensor_v2, _rebuild_parameter;
//   torch {Float,Half,BFloat16,Double,Long,Int,Short,Char,Byte,Bool}Storage.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {

// Together they keep a hostile pickle below about 100 MB; the largest real one stays below a tenth of each.
struct PickleLimits {
  static constexpr int64_t kBytes = 64 << 20;
  static constexpr int64_t kOpcodes = 1 << 20;       // Also bounds the items of all containers together.
  static constexpr int64_t kStackDepth = 128 << 10;  // Values. The whole dict may lie there before one SETITEMS.
  static constexpr int64_t kMarkDepth = 64;          // Nested open MARKs; real files have 4.
  static constexpr int64_t kMemoEntries = 512 << 10;
  static constexpr int64_t kStringBytes = 1 << 20;
  static constexpr int64_t kGlobalBytes = 256;  // Of module and name each.
};

struct PickledStorage {
  std::string key;  // Names the payload in the container.
  ElementType type = ElementType::kFloat32;
  int64_t elements = 0;  // >= 0
};

// A view of a storage, not yet checked against it.
struct PickledTensor {
  int storage = 0;  // Index into Pickle::storages().
  int64_t offset = 0;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

// One parsed pickle. Strings are views of the bytes it was parsed from, which must outlive it.
class Pickle {
 public:
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInt,
    kString,
    kTuple,
    kList,
    kDict,
    kGlobal,
    kStorage,
    kTensor,
    kOpaque,  // Whatever a state dict does not need.
  };

  // Small and copied freely; containers live in the Pickle. A container may hold itself, so follow it to a fixed depth.
  struct Value {
    Kind kind = Kind::kNone;
    int64_t payload = 0;  // The bool or int itself; else an index.
  };

  // Parses one pickle at the start of `bytes`. kInvalidArgument: not a pickle of the kind above, or over a limit;
  // kDataLoss: it ends too soon. Messages name the opcode's position.
  static absl::StatusOr<Pickle> Parse(absl::Span<const uint8_t> bytes);

  Value root() const { return root_; }
  int64_t size_bytes() const { return size_bytes_; }  // Up to and including STOP.

  absl::string_view AsString(Value value) const { return strings_[value.payload]; }       // kString
  absl::Span<const Value> Items(Value value) const { return sequences_[value.payload]; }  // kTuple, kList
  absl::Span<const std::pair<Value, Value>> Entries(Value value) const { return dicts_[value.payload]; }  // kDict
  const PickledTensor& AsTensor(Value value) const { return tensors_[value.payload]; }                    // kTensor
  absl::Span<const PickledStorage> storages() const { return storages_; }
  // Classes and functions of opaque values, "module name", each once, the first kMaxOpaque of them.
  static constexpr size_t kMaxOpaque = 16;
  absl::Span<const std::string> opaque() const { return opaque_; }

  // The tensors of a checkpoint: those in the root dict, and those in dicts directly inside it ({"state_dict": {...}});
  // other values are skipped. kInvalidArgument: the root is no dict, or a tensor's key is no string. kUnimplemented:
  // what the PyPI package rwkv makes of a model for a strategy of its own.
  absl::StatusOr<std::vector<std::pair<absl::string_view, const PickledTensor*>>> StateDict() const;

 private:
  friend class PickleBuilder;
  friend class PickleMachine;

  Value root_;
  int64_t size_bytes_ = 0;
  std::vector<absl::string_view> strings_;
  std::vector<std::vector<Value>> sequences_;
  std::vector<std::vector<std::pair<Value, Value>>> dicts_;
  std::vector<PickledStorage> storages_;
  std::vector<PickledTensor> tensors_;
  std::vector<std::string> opaque_;
};

}  // namespace rwkv::checkpoint
