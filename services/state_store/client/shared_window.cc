#include "services/state_store/client/shared_window.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace rwkv::state_store {
namespace {

constexpr char kFolder[] = "/dev/shm/";
constexpr char kPrefix[] = "rwkv-states-";
constexpr size_t kSecretBytes = 16;
constexpr int kTries = 8;

absl::Status Failed(absl::string_view what) {
  return absl::UnavailableError(absl::StrCat("shared memory: ", what, ": ", absl::ErrnoToStatus(errno, "").message()));
}

bool IsName(absl::string_view name) {
  if (!absl::ConsumePrefix(&name, kPrefix) || name.size() != 2 * kSecretBytes) return false;
  return std::all_of(name.begin(), name.end(), [](char c) { return absl::ascii_isxdigit(c); });
}

std::string Path(absl::string_view name) { return absl::StrCat(kFolder, name); }

// Of processes that ended without removing theirs: nobody holds their locks.
void RemoveAbandoned() {
  DIR* const folder = opendir(kFolder);
  if (folder == nullptr) return;
  while (const dirent* const entry = readdir(folder)) {
    if (!IsName(entry->d_name)) continue;
    const int fd = open(Path(entry->d_name).c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) continue;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) unlink(Path(entry->d_name).c_str());
    close(fd);
  }
  closedir(folder);
}

}  // namespace

absl::StatusOr<SharedFile> SharedFile::Open(absl::string_view name) {
  if (!IsName(name)) return absl::InvalidArgumentError("shared memory: not the name of any");
  SharedFile file(open(Path(name).c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat status = {};
  if (file.fd_ < 0 || fstat(file.fd_, &status) != 0 || !S_ISREG(status.st_mode) || status.st_uid != geteuid()) {
    return absl::NotFoundError("shared memory: there is none of that name here");
  }
  return file;
}

absl::StatusOr<SharedFile> SharedFile::Make(std::string* name) {
  // Another process that begins may take one that has no lock yet for abandoned.
  for (int tries = 1;; ++tries) {
    char secret[kSecretBytes];
    if (getrandom(secret, sizeof(secret), 0) != sizeof(secret)) return Failed("no random number");
    *name = absl::StrCat(kPrefix, absl::BytesToHexString(absl::string_view(secret, sizeof(secret))));
    SharedFile file(open(Path(*name).c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (file.fd_ < 0) return Failed(absl::StrCat("cannot make ", Path(*name)));
    struct stat status = {};
    const bool locked = flock(file.fd_, LOCK_EX | LOCK_NB) == 0;
    if (locked && fstat(file.fd_, &status) == 0 && status.st_nlink > 0) return file;
    unlink(Path(*name).c_str());
    if (tries == kTries) return absl::UnavailableError(absl::StrCat("shared memory: cannot keep ", Path(*name)));
  }
}

SharedFile::SharedFile(SharedFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

SharedFile::~SharedFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status SharedFile::Read(uint64_t offset, absl::Span<char> to) const {
  while (!to.empty()) {
    const ssize_t bytes = pread(fd_, to.data(), to.size(), static_cast<off_t>(offset));
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) return Failed("cannot read");
    if (bytes == 0) return absl::UnavailableError(absl::StrCat("shared memory: it ends before byte ", offset));
    to.remove_prefix(bytes);
    offset += bytes;
  }
  return absl::OkStatus();
}

absl::Status SharedFile::Write(uint64_t offset, absl::Span<const char> from) const {
  while (!from.empty()) {
    const ssize_t bytes = pwrite(fd_, from.data(), from.size(), static_cast<off_t>(offset));
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) return Failed("cannot write");
    from.remove_prefix(bytes);
    offset += bytes;
  }
  return absl::OkStatus();
}

std::shared_ptr<SharedWindow> SharedWindow::Create(size_t places, size_t place_bytes) {
  RemoveAbandoned();
  return std::shared_ptr<SharedWindow>(new SharedWindow(places, place_bytes));
}

absl::StatusOr<absl::optional<SharedWindow::Place>> SharedWindow::Take(size_t bytes) {
  if (bytes > place_bytes_) return absl::optional<Place>();
  {
    absl::MutexLock lock(&mu_);
    if (left_ == 0) return absl::optional<Place>();
    --left_;
    if (!free_.empty()) {
      std::unique_ptr<Place::OwnFile> file = std::move(free_.back());
      free_.pop_back();
      return absl::optional<Place>(Place(shared_from_this(), std::move(file)));
    }
  }
  std::string name;
  absl::StatusOr<SharedFile> made = SharedFile::Make(&name);
  if (made.ok()) {
    return absl::optional<Place>(
        Place(shared_from_this(), std::make_unique<Place::OwnFile>(std::move(name), *std::move(made))));
  }
  absl::MutexLock lock(&mu_);
  ++left_;
  return made.status();
}

SharedWindow::Place::~Place() {
  if (file_ == nullptr) return;
  absl::MutexLock lock(&window_->mu_);
  ++window_->left_;
  if (!abandoned_) window_->free_.push_back(std::move(file_));
}

SharedWindow::Place::OwnFile::~OwnFile() { unlink(Path(name).c_str()); }

}  // namespace rwkv::state_store
