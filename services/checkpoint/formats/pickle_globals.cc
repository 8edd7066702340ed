#include "services/checkpoint/formats/pickle_globals.h"

#include <algorithm>
#include <iterator>

namespace rwkv::checkpoint {
namespace {

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

}  // namespace

int FindKnownGlobal(absl::string_view module, absl::string_view name) {
  for (size_t i = 0; i < std::size(kGlobals); ++i) {
    if (kGlobals[i].module == module && kGlobals[i].name == name) return static_cast<int>(i);
  }
  return -1;
}

const KnownGlobal& KnownGlobalAt(int index) { return kGlobals[index]; }

bool IsHostile(absl::string_view module, absl::string_view name) {
  // A dunder name reaches through an object to what it was made with.
  if (name.find("__") != absl::string_view::npos) return true;
  const absl::string_view package = module.substr(0, module.find('.'));
  if ((package == "builtins" || package == "__builtin__") && IsAnyOf(name, kHarmlessBuiltins)) return false;
  return IsAnyOf(package, kHostile);
}

}  // namespace rwkv::checkpoint
