#include "services/rwkvctl/output_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace rwkv::rwkvctl {

absl::StatusOr<OutputFile> OutputFile::Create(const std::string& path) {
  struct stat existing {};
  if (stat(path.c_str(), &existing) == 0 && !S_ISREG(existing.st_mode)) {  // To be renamed over, a device is lost.
    return absl::InvalidArgumentError(absl::StrCat(path, " is no regular file"));
  }
  std::string temporary_path = absl::StrCat(path, ".", getpid(), ".tmp");
  std::FILE* file = std::fopen(temporary_path.c_str(), "wbx");
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("cannot create ", temporary_path));
  return OutputFile(path, std::move(temporary_path), file);
}

OutputFile::~OutputFile() {
  if (file_ == nullptr) return;  // Moved from, or committed.
  file_.reset();
  std::remove(temporary_path_.c_str());
}

absl::Status OutputFile::Write(absl::string_view bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), file_.get()) != bytes.size()) return Error("cannot write ");
  return absl::OkStatus();
}

absl::Status OutputFile::Commit() {
  // On the disk before it gets its name: after a crash, too, the file is whole or not there.
  if (std::fflush(file_.get()) != 0 || fsync(fileno(file_.get())) != 0) return Error("cannot write ");
  if (std::rename(temporary_path_.c_str(), path_.c_str()) != 0) return Error("cannot rename a new file to ");
  file_.reset();
  return absl::OkStatus();
}

absl::Status OutputFile::Error(absl::string_view what) const {
  return absl::ErrnoToStatus(errno, absl::StrCat(what, path_));
}

}  // namespace rwkv::rwkvctl
