// Memory that a client and a store on one machine share: files in /dev/shm. Records that go through it are copied into
// it and out of it; a connection would have them copied by both ends and twice by the kernel, and split into packets.
//
// The client makes them and removes them. A name, which nobody can guess, is the right to use the file; only processes of
// the same user can. Neither end maps it, so that no page can be taken from under the other. Each call has a file of its
// own: the kernel lets one at a time write to one.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"

namespace rwkv::state_store {

// Either end of one. Thread-safe.
class SharedFile {
 public:
  // The store's end. kInvalidArgument: not the name of one. kNotFound: there is none of that name here, or it is not
  // ours: the client is on another machine, or of another user.
  static absl::StatusOr<SharedFile> Open(absl::string_view name);
  // The client's: a new one, under a new name. kUnavailable: it cannot be made.
  static absl::StatusOr<SharedFile> Make(std::string* name);
  ~SharedFile();
  SharedFile(SharedFile&& other) noexcept;
  SharedFile& operator=(SharedFile&&) = delete;

  // kUnavailable: it is shorter, cannot be read, or there is no memory.
  absl::Status Read(uint64_t offset, absl::Span<char> to) const;
  absl::Status Write(uint64_t offset, absl::Span<const char> from) const;

 private:
  explicit SharedFile(int fd) : fd_(fd) {}

  int fd_;  // -1: moved from.
};

// The client's end: files for as many calls at a time, each with memory as far as it was ever written to. Thread-safe.
class SharedWindow : public std::enable_shared_from_this<SharedWindow> {
 public:
  // At most `places`, of `place_bytes` each. Removes what dead processes left.
  static std::shared_ptr<SharedWindow> Create(size_t places, size_t place_bytes);

  // A file that nobody else uses. Given back when it goes, unless it was abandoned.
  class Place {
   public:
    Place(Place&&) = default;
    Place& operator=(Place&&) = delete;
    ~Place();

    const std::string& name() const { return file_->name; }
    const SharedFile& file() const { return file_->file; }
    // The store may still write to it: it is never given out again.
    void Abandon() { abandoned_ = true; }

   private:
    friend class SharedWindow;
    struct OwnFile {
      OwnFile(std::string name, SharedFile file) : name(std::move(name)), file(std::move(file)) {}
      ~OwnFile();
      const std::string name;
      const SharedFile file;
    };
    Place(std::shared_ptr<SharedWindow> window, std::unique_ptr<OwnFile> file)
        : window_(std::move(window)), file_(std::move(file)) {}

    std::shared_ptr<SharedWindow> window_;
    std::unique_ptr<OwnFile> file_;  // Null: moved from.
    bool abandoned_ = false;
  };

  // Unset: all are in use, or a place has not so many bytes. kUnavailable: there is no /dev/shm, or no file can be made.
  absl::StatusOr<absl::optional<Place>> Take(size_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  SharedWindow(size_t places, size_t place_bytes) : place_bytes_(place_bytes), left_(places) {}

  const size_t place_bytes_;
  absl::Mutex mu_;
  size_t left_ ABSL_GUARDED_BY(mu_);  // So many more may be in use.
  // The last used is used next: its memory is there.
  std::vector<std::unique_ptr<Place::OwnFile>> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::state_store
