// How far a long command is, on one line of a terminal that is drawn over.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::rwkvctl {

// Draws when the percentage changes, and wipes its line at the end. Not thread-safe.
class ProgressBar {
 public:
  // `out` is null where nobody looks (it is no terminal): nothing is drawn. It outlives the bar.
  ProgressBar(std::ostream* out, absl::string_view label) : out_(out), label_(label) {}
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // `done` of `total` units; total >= 1.
  void Update(uint64_t done, uint64_t total);

 private:
  std::ostream* const out_;
  const std::string label_;
  int percent_ = -1;  // Drawn last.
};

}  // namespace rwkv::rwkvctl
