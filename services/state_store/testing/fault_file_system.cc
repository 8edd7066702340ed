#include "services/state_store/testing/fault_file_system.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/time/clock.h"

namespace rwkv::state_store {

class FaultFileSystem::File final : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  File(FaultFileSystem* fs, std::shared_ptr<Length> length, std::unique_ptr<rocksdb::FSWritableFile> file)
      : FSWritableFileOwnerWrapper(std::move(file)), fs_(fs), length_(std::move(length)) {}

  rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                           rocksdb::IODebugContext* debug) override {
    const rocksdb::IOStatus error = fs_->WriteError();
    const rocksdb::Slice part(data.data(), error.ok() ? data.size() : data.size() / 2);
    rocksdb::IOStatus status = target()->Append(part, options, debug);
    if (status.ok()) {
      absl::MutexLock lock(&fs_->mu_);
      length_->written += part.size();
    }
    return error.ok() ? status : error;
  }
  rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                           const rocksdb::DataVerificationInfo& verification, rocksdb::IODebugContext* debug) override {
    return Append(data, options, debug);
  }
  // Nothing is preallocated. The inherited code would be compiled into the test, where the thread sanitizer sees its
  // counters but not how RocksDB's writers, in their library, hand the file from one to the next.
  void PrepareWrite(size_t offset, size_t length, const rocksdb::IOOptions& options,
                    rocksdb::IODebugContext* debug) override {}
  rocksdb::IOStatus Truncate(uint64_t size, const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* debug) override {
    rocksdb::IOStatus status = target()->Truncate(size, options, debug);
    absl::MutexLock lock(&fs_->mu_);
    if (status.ok()) {
      length_->written = size;
      length_->synced = std::min(length_->synced, size);
    }
    return status;
  }
  rocksdb::IOStatus Sync(const rocksdb::IOOptions& options, rocksdb::IODebugContext* debug) override {
    return DoSync([&] { return target()->Sync(options, debug); });
  }
  rocksdb::IOStatus Fsync(const rocksdb::IOOptions& options, rocksdb::IODebugContext* debug) override {
    return DoSync([&] { return target()->Fsync(options, debug); });
  }
  rocksdb::IOStatus Close(const rocksdb::IOOptions& options, rocksdb::IODebugContext* debug) override {
    return target()->Close(options, debug);
  }

 private:
  template <typename Sync>
  rocksdb::IOStatus DoSync(Sync sync) {
    if (rocksdb::IOStatus error = fs_->SyncError(); !error.ok()) {
      absl::MutexLock lock(&fs_->mu_);
      if (length_->written > length_->synced) length_->lost.emplace_back(length_->synced, length_->written);
      return error;
    }
    uint64_t written;
    absl::Duration duration;
    {
      absl::MutexLock lock(&fs_->mu_);
      written = length_->written;
      duration = fs_->sync_duration_;
    }
    absl::SleepFor(duration);
    rocksdb::IOStatus status = sync();
    absl::MutexLock lock(&fs_->mu_);
    if (status.ok()) length_->synced = std::max(length_->synced, written);
    return status;
  }

  FaultFileSystem* const fs_;
  const std::shared_ptr<Length> length_;
};

class FaultFileSystem::Directory final : public rocksdb::FSDirectoryWrapper {
 public:
  Directory(FaultFileSystem* fs, std::string path, std::unique_ptr<rocksdb::FSDirectory> directory)
      : FSDirectoryWrapper(std::move(directory)), fs_(fs), path_(std::move(path)) {}

  rocksdb::IOStatus Fsync(const rocksdb::IOOptions& options, rocksdb::IODebugContext* debug) override {
    return FsyncWithDirOptions(options, debug, rocksdb::DirFsyncOptions());
  }
  rocksdb::IOStatus FsyncWithDirOptions(const rocksdb::IOOptions& options, rocksdb::IODebugContext* debug,
                                        const rocksdb::DirFsyncOptions& how) override {
    if (rocksdb::IOStatus error = fs_->SyncError(); !error.ok()) return error;
    std::set<std::string> names;
    {
      absl::MutexLock lock(&fs_->mu_);
      for (const std::string& name : fs_->new_names_) {
        if (std::filesystem::path(name).parent_path() == path_) names.insert(name);
      }
    }
    rocksdb::IOStatus status = FSDirectoryWrapper::FsyncWithDirOptions(options, debug, how);
    absl::MutexLock lock(&fs_->mu_);
    if (status.ok()) {
      for (const std::string& name : names) fs_->new_names_.erase(name);
    }
    return status;
  }

 private:
  FaultFileSystem* const fs_;
  const std::filesystem::path path_;
};

FaultFileSystem::FaultFileSystem() : FileSystemWrapper(rocksdb::FileSystem::Default()) {}

void FaultFileSystem::FailWritesWith(rocksdb::IOStatus error) {
  absl::MutexLock lock(&mu_);
  error_ = std::move(error);
}

void FaultFileSystem::FailSyncsWith(rocksdb::IOStatus error) {
  absl::MutexLock lock(&mu_);
  sync_error_ = std::move(error);
}

void FaultFileSystem::SlowSyncs(absl::Duration duration) {
  absl::MutexLock lock(&mu_);
  sync_duration_ = duration;
}

rocksdb::IOStatus FaultFileSystem::WriteError() {
  absl::MutexLock lock(&mu_);
  return error_;
}

rocksdb::IOStatus FaultFileSystem::SyncError() {
  absl::MutexLock lock(&mu_);
  return error_.ok() ? sync_error_ : error_;
}

std::unique_ptr<rocksdb::FSWritableFile> FaultFileSystem::Wrap(const std::string& path,
                                                               std::unique_ptr<rocksdb::FSWritableFile> file) {
  auto length = std::make_shared<Length>();
  {
    absl::MutexLock lock(&mu_);
    lengths_[path] = length;
  }
  return std::make_unique<File>(this, std::move(length), std::move(file));
}

void FaultFileSystem::CopyAsAfterCrash(const std::string& from, const std::string& to,
                                       const std::function<bool(const std::string& path)>& survives) {
  std::filesystem::create_directories(to);
  absl::MutexLock lock(&mu_);  // So that no file is renamed, deleted or synced meanwhile.
  for (auto entry = std::filesystem::recursive_directory_iterator(from); entry != end(entry); ++entry) {
    const std::string path = entry->path().string();
    const std::string name = std::filesystem::relative(entry->path(), from).string();
    const bool whole = survives != nullptr && survives(path);
    if (!whole && new_names_.count(path) > 0) {
      entry.disable_recursion_pending();
      continue;
    }
    if (entry->is_directory()) std::filesystem::create_directories(to + "/" + name);
    if (!entry->is_regular_file() || entry->path().filename() == "LOCK") continue;
    std::ifstream in(path, std::ios::binary);
    std::stringstream content;
    content << in.rdbuf();
    std::string bytes = content.str();
    const auto length = lengths_.find(path);
    if (!whole && length != lengths_.end()) {
      bytes.resize(std::min<uint64_t>(bytes.size(), length->second->synced));
      for (const auto& [lost_from, lost_to] : length->second->lost) {
        if (lost_to <= bytes.size()) std::fill(bytes.begin() + lost_from, bytes.begin() + lost_to, '\0');
      }
    }
    std::ofstream(to + "/" + name, std::ios::binary) << bytes;
  }
}

rocksdb::IOStatus FaultFileSystem::NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                                   std::unique_ptr<rocksdb::FSWritableFile>* file,
                                                   rocksdb::IODebugContext* debug) {
  if (rocksdb::IOStatus error = WriteError(); !error.ok()) return error;
  const bool is_new = !std::filesystem::exists(path);
  std::unique_ptr<rocksdb::FSWritableFile> real;
  rocksdb::IOStatus status = target()->NewWritableFile(path, options, &real, debug);
  if (!status.ok()) return status;
  *file = Wrap(path, std::move(real));
  absl::MutexLock lock(&mu_);
  if (is_new) new_names_.insert(path);
  return status;
}

rocksdb::IOStatus FaultFileSystem::ReopenWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                                      std::unique_ptr<rocksdb::FSWritableFile>* file,
                                                      rocksdb::IODebugContext* debug) {
  if (rocksdb::IOStatus error = WriteError(); !error.ok()) return error;
  std::unique_ptr<rocksdb::FSWritableFile> real;
  rocksdb::IOStatus status = target()->ReopenWritableFile(path, options, &real, debug);
  if (!status.ok()) return status;
  Length before;
  {
    absl::MutexLock lock(&mu_);
    const auto it = lengths_.find(path);
    if (it != lengths_.end()) before = *it->second;
  }
  *file = Wrap(path, std::move(real));
  absl::MutexLock lock(&mu_);
  *lengths_[path] = before;
  return status;
}

rocksdb::IOStatus FaultFileSystem::ReuseWritableFile(const std::string& path, const std::string& old_path,
                                                     const rocksdb::FileOptions& options,
                                                     std::unique_ptr<rocksdb::FSWritableFile>* file,
                                                     rocksdb::IODebugContext* debug) {
  return rocksdb::IOStatus::NotSupported("the database recycles no files");
}

rocksdb::IOStatus FaultFileSystem::RenameFile(const std::string& from, const std::string& to,
                                              const rocksdb::IOOptions& options, rocksdb::IODebugContext* debug) {
  if (rocksdb::IOStatus error = WriteError(); !error.ok()) return error;
  absl::MutexLock lock(&mu_);
  rocksdb::IOStatus status = target()->RenameFile(from, to, options, debug);
  if (status.ok()) {
    lengths_.erase(to);
    new_names_.erase(to);
    if (new_names_.erase(from) > 0) new_names_.insert(to);
    if (auto length = lengths_.extract(from); !length.empty()) {
      length.key() = to;
      lengths_.insert(std::move(length));
    }
  }
  return status;
}

rocksdb::IOStatus FaultFileSystem::DeleteFile(const std::string& path, const rocksdb::IOOptions& options,
                                              rocksdb::IODebugContext* debug) {
  absl::MutexLock lock(&mu_);
  lengths_.erase(path);
  new_names_.erase(path);
  return target()->DeleteFile(path, options, debug);
}

rocksdb::IOStatus FaultFileSystem::CreateDirIfMissing(const std::string& path, const rocksdb::IOOptions& options,
                                                      rocksdb::IODebugContext* debug) {
  if (rocksdb::IOStatus error = WriteError(); !error.ok()) return error;
  const bool is_new = !std::filesystem::exists(path);
  rocksdb::IOStatus status = target()->CreateDirIfMissing(path, options, debug);
  absl::MutexLock lock(&mu_);
  if (status.ok() && is_new) new_names_.insert(path);
  return status;
}

rocksdb::IOStatus FaultFileSystem::NewDirectory(const std::string& path, const rocksdb::IOOptions& options,
                                                std::unique_ptr<rocksdb::FSDirectory>* directory,
                                                rocksdb::IODebugContext* debug) {
  std::unique_ptr<rocksdb::FSDirectory> real;
  rocksdb::IOStatus status = target()->NewDirectory(path, options, &real, debug);
  if (status.ok()) *directory = std::make_unique<Directory>(this, path, std::move(real));
  return status;
}

}  // namespace rwkv::state_store
