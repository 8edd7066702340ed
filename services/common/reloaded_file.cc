#include "services/common/reloaded_file.h"

#include <errno.h>
#include <sys/stat.h>

#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"

namespace rwkv::common {

ReloadedFile::ReloadedFile(std::string path, std::string what, size_t max_bytes, absl::Duration reload_interval,
                           Use use, Metrics* metrics)
    : path_(std::move(path)),
      what_(std::move(what)),
      max_bytes_(max_bytes),
      reload_interval_(reload_interval),
      use_(std::move(use)),
      unusable_(&metrics->Gauge("rwkv_server_file_unusable",
                                "1: what the file holds now is of no use, and what it held before is used.",
                                {{"file", what_}})) {}

absl::StatusOr<ReloadedFile::Mark> ReloadedFile::MarkOf(const std::string& path) {
  struct stat file;
  if (stat(path.c_str(), &file) != 0) return absl::ErrnoToStatus(errno, path);
  Mark mark;
  mark.device = file.st_dev;
  mark.inode = file.st_ino;
  mark.size = file.st_size;
  mark.changed_ns = int64_t{file.st_ctim.tv_sec} * 1'000'000'000 + file.st_ctim.tv_nsec;
  return mark;
}

absl::Status ReloadedFile::Read() {
  RWKV_ASSIGN_OR_RETURN(const Mark mark, MarkOf(path_));
  if (static_cast<size_t>(mark.size) > max_bytes_) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": larger than ", max_bytes_, " bytes"));
  }
  std::ifstream file(path_, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (text.str().size() != static_cast<size_t>(mark.size)) {  // No file, or somebody writes to it at this moment.
    return absl::UnavailableError(absl::StrCat(path_, ": cannot be read whole"));
  }
  mark_ = mark;  // Also if it is wrong: it is not worth a line a second.
  const absl::Status used = use_(text.str());
  if (used.ok()) return used;
  return absl::Status(used.code(), absl::StrCat(path_, ": ", used.message()));
}

absl::StatusOr<std::unique_ptr<ReloadedFile>> ReloadedFile::Open(const std::string& path, const std::string& what,
                                                                 size_t max_bytes, absl::Duration reload_interval,
                                                                 Use use, Metrics* metrics) {
  std::unique_ptr<ReloadedFile> file(new ReloadedFile(path, what, max_bytes, reload_interval, std::move(use), metrics));
  RWKV_RETURN_IF_ERROR(file->Read());
  file->looked_at_ = absl::Now();
  return file;
}

bool ReloadedFile::Look(absl::Time now) {
  if (now < looked_at_ + reload_interval_) return false;
  looked_at_ = now;
  const absl::StatusOr<Mark> mark = MarkOf(path_);
  if (mark.ok() && mark_.has_value() && *mark == *mark_) return false;
  if (!mark.ok() && !mark_.has_value()) return false;  // Still away: said already.
  if (!mark.ok()) mark_.reset();
  const absl::Status status = mark.ok() ? Read() : mark.status();
  unusable_->Set(status.ok() ? 0 : 1);
  if (status.ok()) {
    LogInfo(absl::StrCat(what_, "_read"), {{"file", path_}});
  } else {
    LogWarning(absl::StrCat(what_, "_unusable"), {{"file", path_}, {"why", status.message()}});
  }
  return true;
}

}  // namespace rwkv::common
