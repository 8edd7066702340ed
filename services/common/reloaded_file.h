// A small file that is read again when it changes, by whoever asks: no thread, no notification. A new content that is
// of no use is reported once in the log, and by a metric for as long as it is there; the one of before stays.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "prometheus/gauge.h"
#include "services/common/metrics.h"

namespace rwkv::common {

// Not thread-safe.
class ReloadedFile {
 public:
  // Takes over what the file says, or says why it cannot.
  using Use = std::function<absl::Status(const std::string& text)>;

  // Reads it and looks at it again at most every `reload_interval`. `what` names it in logs: WHAT_read, WHAT_unusable.
  // `metrics`, which outlives it, gets rwkv_server_file_unusable{file=WHAT}.
  // Errors: the file cannot be read, is larger than `max_bytes`, or `use` has refused it; they name the file.
  static absl::StatusOr<std::unique_ptr<ReloadedFile>> Open(const std::string& path, const std::string& what,
                                                            size_t max_bytes, absl::Duration reload_interval, Use use,
                                                            Metrics* metrics);

  // Whether there was something new, used or refused.
  bool Look(absl::Time now);

 private:
  struct Mark {  // What changes with the file, also when it is replaced within a second.
    dev_t device = 0;
    ino_t inode = 0;
    off_t size = 0;
    int64_t changed_ns = 0;
    bool operator==(const Mark& other) const {
      return device == other.device && inode == other.inode && size == other.size && changed_ns == other.changed_ns;
    }
  };

  ReloadedFile(std::string path, std::string what, size_t max_bytes, absl::Duration reload_interval, Use use,
               Metrics* metrics);
  static absl::StatusOr<Mark> MarkOf(const std::string& path);
  absl::Status Read();

  const std::string path_;
  const std::string what_;
  const size_t max_bytes_;
  const absl::Duration reload_interval_;
  const Use use_;
  prometheus::Gauge* const unusable_;
  absl::optional<Mark> mark_;  // Of what was read last, used or not; unset: it could not be read.
  absl::Time looked_at_ = absl::InfinitePast();
};

}  // namespace rwkv::common
