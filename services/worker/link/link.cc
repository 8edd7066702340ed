#include "services/worker/link/link.h"

#include "absl/strings/str_cat.h"

namespace rwkv::worker {

absl::Status CheckHeader(const LinkHeader& header, const LinkShape& shape, uint64_t expected_step) {
  if (header.step_id != expected_step) {
    return absl::InvalidArgumentError(absl::StrCat("link: step ", header.step_id, " where ", expected_step, " is due"));
  }
  if (header.rows < 0 || header.rows > shape.max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("link: step ", header.step_id, " has ", header.rows, " rows, room for ", shape.max_rows));
  }
  if (header.own_step.entries_size() > shape.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "link: step ", header.step_id, " has ", header.own_step.entries_size(), " entries of the first stage's own"));
  }
  int64_t previous = -1;
  for (const RefusedEntry& refused : header.refused) {
    if (refused.entry <= previous || refused.status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("link: step ", header.step_id, ": refused entry ", refused.entry, " after ", previous));
    }
    previous = refused.entry;
  }
  return absl::OkStatus();
}

}  // namespace rwkv::worker
