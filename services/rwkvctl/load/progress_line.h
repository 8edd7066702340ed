// How far a load is, as a line for who watches.
#pragma once

#include <cstdint>
#include <ostream>

#include "absl/time/time.h"

namespace rwkv::rwkvctl {

// Of a load that runs.
struct LoadProgress {
  absl::Duration elapsed;
  uint64_t sent = 0;  // Requests that were begun.
  uint64_t completed = 0;
  uint64_t failed = 0;
  uint64_t refusals = 0;
  uint64_t generated_tokens = 0;  // Also of requests that run.
  absl::Duration ttft_p50;        // Of all that have ended and are measured.
  uint64_t in_flight() const { return sent - completed - failed; }
};

// Drawn over each second on a terminal, and wiped at the end; elsewhere a line every ten seconds. Not thread-safe.
class LoadProgressLine {
 public:
  // `out` outlives it.
  LoadProgressLine(std::ostream& out, bool is_terminal) : out_(out), is_terminal_(is_terminal) {}
  ~LoadProgressLine();
  LoadProgressLine(const LoadProgressLine&) = delete;
  LoadProgressLine& operator=(const LoadProgressLine&) = delete;

  absl::Duration interval() const { return is_terminal_ ? absl::Seconds(1) : absl::Seconds(10); }

  // Tokens a second are those since the last call.
  void Update(const LoadProgress& now);

 private:
  std::ostream& out_;
  const bool is_terminal_;
  LoadProgress last_;
};

}  // namespace rwkv::rwkvctl
