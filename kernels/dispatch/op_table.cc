#include "kernels/dispatch/op_table.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cpu/cpu.h"
#include "kernels/reference/reference.h"

namespace rwkv::kernels {
namespace {

struct Candidate {
  const OpTable* table;
  bool runs_here;
};

// The plain reference first, then from slow to fast.
std::vector<Candidate> Candidates() {
  std::vector<Candidate> candidates = {{&reference::Table(), true}};
  for (const cpu::Backend& backend : cpu::Backends()) candidates.push_back({backend.table, backend.runs_here});
  return candidates;
}

}  // namespace

absl::StatusOr<const OpTable*> ChooseOpTable(absl::string_view request) {
  if (request == "auto") return AvailableOpTables().back();
  std::vector<std::string> names = {"auto"};
  for (const Candidate& candidate : Candidates()) {
    if (candidate.table->name == request) {
      if (candidate.runs_here) return candidate.table;
      return absl::UnimplementedError(absl::StrCat("kernels \"", request, "\" cannot run on this processor"));
    }
    names.emplace_back(candidate.table->name);
  }
  return absl::InvalidArgumentError(absl::StrCat("kernels \"", request, "\" is none of ", absl::StrJoin(names, ", ")));
}

std::vector<const OpTable*> AvailableOpTables() {
  std::vector<const OpTable*> tables;
  for (const Candidate& candidate : Candidates()) {
    if (candidate.runs_here) tables.push_back(candidate.table);
  }
  return tables;
}

}  // namespace rwkv::kernels
