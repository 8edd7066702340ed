#include "services/worker/link/link.h"

#include "absl/strings/str_cat.h"

namespace rwkv::worker {

absl::Status CheckFrame(const LinkFrame& frame, const LinkShape& shape, uint64_t expected_step) {
  if (frame.step_id != expected_step) {
    return absl::InvalidArgumentError(absl::StrCat("link: step ", frame.step_id, " where ", expected_step, " is due"));
  }
  if (frame.rows < 0 || frame.rows > shape.max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("link: step ", frame.step_id, " has ", frame.rows, " rows, room for ", shape.max_rows));
  }
  const auto check_size = [&frame](const char* name, size_t size, int64_t width) {
    if (size == static_cast<size_t>(frame.rows * width)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("link: step ", frame.step_id, ": ", name, " has ", size,
                                                   " numbers, not ", frame.rows, " rows of ", width));
  };
  if (absl::Status status = check_size("x", frame.x.size(), shape.width); !status.ok()) return status;
  if (absl::Status status = check_size("v_first", frame.v_first.size(), shape.v_first_width); !status.ok()) {
    return status;
  }
  int64_t previous = -1;
  for (const RefusedEntry& refused : frame.refused) {
    if (refused.entry <= previous || refused.status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("link: step ", frame.step_id, ": refused entry ", refused.entry, " after ", previous));
    }
    previous = refused.entry;
  }
  return absl::OkStatus();
}

}  // namespace rwkv::worker
