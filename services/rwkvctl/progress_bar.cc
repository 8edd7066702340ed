#include "services/rwkvctl/progress_bar.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace rwkv::rwkvctl {
namespace {

constexpr int kWidth = 40;

}  // namespace

ProgressBar::~ProgressBar() {
  if (percent_ >= 0) *out_ << "\r\x1b[K" << std::flush;
}

void ProgressBar::Update(uint64_t done, uint64_t total) {
  if (out_ == nullptr) return;
  const int percent = static_cast<int>(100.0 * static_cast<double>(std::min(done, total)) / static_cast<double>(total));
  if (percent == percent_) return;
  percent_ = percent;
  std::string bar(percent * kWidth / 100, '#');
  bar.resize(kWidth, ' ');
  *out_ << absl::StrFormat("\r%s [%s] %3d %%", label_, bar, percent) << std::flush;
}

}  // namespace rwkv::rwkvctl
