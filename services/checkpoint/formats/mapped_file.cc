#include "services/checkpoint/formats/mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace rwkv::checkpoint {

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  // O_NONBLOCK: opening a pipe that nobody writes to must not hang.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  return OfDescriptor(descriptor, path);
}

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::OfDescriptor(int descriptor, const std::string& path) {
  struct stat info;
  if (fstat(descriptor, &info) != 0) {
    const absl::Status status = absl::ErrnoToStatus(errno, absl::StrCat("cannot inspect ", path));
    close(descriptor);
    return status;
  }
  if (!S_ISREG(info.st_mode) || info.st_size <= 0) {
    close(descriptor);
    const char* what = S_ISDIR(info.st_mode) ? "a directory" : S_ISREG(info.st_mode) ? "empty" : "not a regular file";
    return absl::InvalidArgumentError(absl::StrCat(path, " is ", what));
  }
  void* memory = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) {
    const absl::Status status = absl::ErrnoToStatus(errno, absl::StrCat("cannot map ", path));
    close(descriptor);
    return status;
  }
  return std::unique_ptr<MappedFile>(
      new MappedFile(descriptor, absl::MakeConstSpan(static_cast<const uint8_t*>(memory), info.st_size)));
}

MappedFile::~MappedFile() {
  absl::MutexLock lock(&mu_);
  for (const auto& [range, memory] : views_) munmap(const_cast<uint8_t*>(memory), static_cast<size_t>(range.second));
  munmap(const_cast<uint8_t*>(bytes_.data()), bytes_.size());
  close(descriptor_);
}

absl::StatusOr<const uint8_t*> MappedFile::View(int64_t offset, int64_t size) const {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = offset / page * page;
  absl::MutexLock lock(&mu_);
  const uint8_t*& view = views_[{begin, offset + size - begin}];
  if (view == nullptr) {
    void* memory = mmap(nullptr, static_cast<size_t>(offset + size - begin), PROT_READ, MAP_SHARED, descriptor_, begin);
    if (memory == MAP_FAILED) {
      const int error = errno;
      views_.erase({begin, offset + size - begin});
      return absl::ResourceExhaustedError(
          absl::StrCat("cannot map ", size, " bytes at byte ", offset, ": ", absl::ErrnoToStatus(error, "").message()));
    }
    view = static_cast<const uint8_t*>(memory);
  }
  return view + (offset - begin);
}

void MappedFile::Forget(int64_t offset, int64_t size) const {
  // The page cache's pieces are aligned to their size.
  const int64_t begin = offset / kNeighbourhood * kNeighbourhood;
  const int64_t end = std::min((offset + size + kNeighbourhood - 1) / kNeighbourhood * kNeighbourhood,
                               static_cast<int64_t>(bytes_.size()));
  if (begin >= end) return;
  // Of a shared map of a file nothing is lost; if it fails, the pages just stay.
  (void)madvise(const_cast<uint8_t*>(bytes_.data()) + begin, static_cast<size_t>(end - begin), MADV_DONTNEED);
}

void MappedFile::ForgetView(const uint8_t* view, int64_t size) const {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(view) / page * page;  // No view shares its pages.
  (void)madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(view) + size - begin, MADV_DONTNEED);
}

absl::Status MappedFile::ReadAt(int64_t offset, absl::Span<uint8_t> out) const {
  while (!out.empty()) {
    const ssize_t count = pread(descriptor_, out.data(), out.size(), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot read at byte ", offset));
    if (count == 0) {
      return absl::DataLossError(
          absl::StrCat("the file ends at byte ", offset, "; it had ", bytes_.size(), " bytes when it was opened"));
    }
    offset += count;
    out.remove_prefix(static_cast<size_t>(count));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::checkpoint
