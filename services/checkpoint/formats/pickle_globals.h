// What the globals of a pickle are here: the constructors of a state dict, known by name, and names that could only
// stand there to run something. Nothing is ever looked up or called.
#pragma once

#include "absl/strings/string_view.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {

enum class Constructor { kOrderedDict, kRebuildTensor, kRebuildTensorV2, kRebuildParameter, kStorage };

struct KnownGlobal {
  absl::string_view module;
  absl::string_view name;
  Constructor constructor;
  ElementType type = ElementType::kFloat32;  // kStorage
};

// Index of a global, for KnownGlobalAt(); -1: unknown here.
int FindKnownGlobal(absl::string_view module, absl::string_view name);
const KnownGlobal& KnownGlobalAt(int index);

// Whether an object of that name is there to run something (os, subprocess, eval, a name of underscores, ...).
bool IsHostile(absl::string_view module, absl::string_view name);

}  // namespace rwkv::checkpoint
