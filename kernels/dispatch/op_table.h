// Chooses a backend, once, at start.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/api/op_table.h"

namespace rwkv::kernels {

// `request` is "auto" (the fastest this machine runs), or a table's name: "reference", "cpu/portable", "cpu/avx2",
// "cpu/avx512". The table lives as long as the process. Thread-safe.
// kInvalidArgument: no such name (the message lists them). kUnimplemented: this machine or build cannot run it.
absl::StatusOr<const OpTable*> ChooseOpTable(absl::string_view request);

// Every table this machine can run, the plain reference first, the fastest last.
std::vector<const OpTable*> AvailableOpTables();

}  // namespace rwkv::kernels
