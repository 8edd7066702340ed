#include "services/state_store/records/rocksdb/record_files.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/records/record_memory.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kManyFiles = 256;  // Open, of snapshots that nobody commits.

// Whether the disk can take them from where they lie, in one write.
bool AreBlocks(absl::Span<const absl::Span<const char>> records) {
  const char* next = records[0].data();
  if (reinterpret_cast<uintptr_t>(next) % kRecordAlignment != 0) return false;
  return std::all_of(records.begin(), records.end(), [&](absl::Span<const char> record) {
    const bool follows = record.data() == next;
    next += WholeBlocks(record.size());
    return follows;
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<RecordFiles>> RecordFiles::Open(rocksdb::Env* env, const std::string& folder) {
  RWKV_RETURN_IF_ERROR(MakeDirectories(*env, folder, "records"));
  // Else the size of the disk's blocks is looked up for every file that is opened.
  env->RegisterDbPaths({folder}).PermitUncheckedError();
  return std::unique_ptr<RecordFiles>(new RecordFiles(env, folder));
}

absl::StatusOr<std::shared_ptr<RecordFiles::File>> RecordFiles::OpenFile(const std::string& snapshot_id) {
  {
    absl::MutexLock lock(&mu_);
    const auto it = files_.find(snapshot_id);
    if (it != files_.end()) return it->second;
  }
  const std::string path = Path(snapshot_id);
  auto file = std::make_shared<File>();
  absl::MutexLock lock(&file->mu);
  const bool is_there = env_->GetFileSize(path, &file->bytes).ok();
  if (!is_there) file->bytes = 0;
  const auto open = [&](bool direct) ABSL_EXCLUSIVE_LOCKS_REQUIRED(file->mu) {
    rocksdb::EnvOptions options;
    options.use_mmap_writes = false;
    options.use_direct_writes = file->direct = direct;
    return is_there ? env_->ReopenWritableFile(path, &file->file, options)
                    : env_->NewWritableFile(path, &file->file, options);
  };
  // One that ends within a block is of a build that did not write in blocks, or has half of a record that failed.
  rocksdb::Status status = open(file->bytes % kRecordAlignment == 0);
  if (!status.ok() && file->direct) status = open(false);  // The file system may be one that cannot.
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, path));
  return file;
}

rocksdb::Status RecordFiles::AppendTo(File& file, absl::Span<const absl::Span<const char>> records) {
  const uint64_t begin = file.bytes;
  for (absl::Span<const char> record : records) file.bytes += file.direct ? WholeBlocks(record.size()) : record.size();
  const size_t bytes = file.bytes - begin;
  if (!file.direct) {
    rocksdb::Status status;
    for (absl::Span<const char> record : records) {
      if (status.ok()) status = file.file->Append(rocksdb::Slice(record.data(), record.size()));
    }
    if (status.ok()) status = file.file->Flush();
    // The disk begins at once, not at the Sync() that somebody waits for.
    if (status.ok()) file.file->RangeSync(begin, bytes).PermitUncheckedError();
    return status;
  }
  if (AreBlocks(records)) return file.file->Append(rocksdb::Slice(records[0].data(), bytes));
  const RecordMemory padded = NewRecordMemory(bytes);
  char* to = padded.get();
  for (absl::Span<const char> record : records) {
    std::memcpy(to, record.data(), record.size());
    std::memset(to + record.size(), 0, WholeBlocks(record.size()) - record.size());
    to += WholeBlocks(record.size());
  }
  return file.file->Append(rocksdb::Slice(padded.get(), bytes));
}

absl::StatusOr<std::vector<uint64_t>> RecordFiles::Append(const std::string& snapshot_id,
                                                          absl::Span<const absl::Span<const char>> records) {
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<File> file, OpenFile(snapshot_id));
  std::vector<uint64_t> offsets;
  rocksdb::Status status;
  {
    absl::MutexLock lock(&file->mu);
    uint64_t offset = file->bytes;
    for (absl::Span<const char> record : records) {
      offsets.push_back(offset);
      offset += file->direct ? WholeBlocks(record.size()) : record.size();
    }
    status = AppendTo(*file, records);
  }
  absl::MutexLock lock(&mu_);
  if (status.ok()) {
    files_[snapshot_id] = file;
  } else {
    files_.erase(snapshot_id);  // Where its end is now, only the file knows.
  }
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, Path(snapshot_id)));
  return offsets;
}

absl::Status RecordFiles::Read(const std::string& snapshot_id, uint64_t offset, size_t bytes,
                               absl::Span<char> to) const {
  const std::string path = Path(snapshot_id);
  std::unique_ptr<rocksdb::RandomAccessFile> file;
  rocksdb::EnvOptions options;
  options.use_direct_reads = offset % kRecordAlignment == 0;
  rocksdb::Status status = env_->NewRandomAccessFile(path, &file, options);
  if (!status.ok() && options.use_direct_reads) {  // The file system may be one that cannot.
    options.use_direct_reads = false;
    status = env_->NewRandomAccessFile(path, &file, options);
  }
  if (status.IsPathNotFound() || status.IsNotFound()) return absl::DataLossError("its bytes are gone");
  absl::Span<char> room = to.first(bytes);
  RecordMemory padded;
  if (options.use_direct_reads) {
    room = absl::MakeSpan(to.data(), WholeBlocks(bytes));
    if (to.size() < room.size() || reinterpret_cast<uintptr_t>(room.data()) % kRecordAlignment != 0) {
      padded = NewRecordMemory(room.size());
      room = absl::MakeSpan(padded.get(), room.size());
    }
  }
  rocksdb::Slice found;
  if (status.ok()) status = file->Read(offset, room.size(), &found, room.data());
  if (!status.ok()) return absl::DataLossError(absl::StrCat("its bytes cannot be read: ", status.ToString()));
  if (found.size() < bytes) {
    return absl::DataLossError(absl::StrCat("only ", found.size(), " of its ", bytes, " bytes are there"));
  }
  if (found.data() != to.data()) std::memcpy(to.data(), found.data(), bytes);
  return absl::OkStatus();
}

absl::Status RecordFiles::Sync(std::vector<std::string>* lost) {
  Files files;
  {
    absl::MutexLock lock(&mu_);
    files.swap(files_);
  }
  return Sync(files, lost);
}

absl::Status RecordFiles::Sync(const std::string& snapshot_id, std::vector<std::string>* lost) {
  Files files;
  {
    absl::MutexLock lock(&mu_);
    if (auto file = files_.extract(snapshot_id); !file.empty()) files.insert(std::move(file));
  }
  return Sync(files, lost);
}

absl::Status RecordFiles::Sync(const Files& files, std::vector<std::string>* lost) {
  if (files.empty()) return absl::OkStatus();
  absl::Status first;
  for (const auto& [snapshot_id, file] : files) {
    absl::MutexLock lock(&file->mu);
    const absl::Status status = FromRocksdbStatus(file->file->Sync(), Path(snapshot_id));
    if (!status.ok()) lost->push_back(snapshot_id);
    first.Update(status);
  }
  if (const absl::Status status = SyncDirectory(*env_, folder_); !status.ok()) {
    lost->clear();
    for (const auto& [snapshot_id, file] : files) lost->push_back(snapshot_id);
    first.Update(status);
  }
  return first;
}

bool RecordFiles::ManyUnsynced() const {
  absl::MutexLock lock(&mu_);
  return files_.size() > kManyFiles;
}

bool RecordFiles::Holds(const std::string& snapshot_id, uint64_t bytes) const {
  uint64_t found = 0;
  return env_->GetFileSize(Path(snapshot_id), &found).ok() && found >= bytes;
}

absl::Status RecordFiles::Delete(const std::string& snapshot_id) {
  {
    absl::MutexLock lock(&mu_);
    files_.erase(snapshot_id);
  }
  const rocksdb::Status status = env_->DeleteFile(Path(snapshot_id));
  if (status.IsPathNotFound() || status.IsNotFound() || !env_->FileExists(Path(snapshot_id)).ok()) {
    return absl::OkStatus();
  }
  return FromRocksdbStatus(status, Path(snapshot_id));
}

absl::StatusOr<std::vector<std::string>> RecordFiles::List() const {
  std::vector<std::string> names, ids;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env_->GetChildren(folder_, &names), folder_));
  for (absl::string_view name : names) {
    if (absl::ConsumeSuffix(&name, ".record")) ids.emplace_back(name);
  }
  return ids;
}

}  // namespace rwkv::state_store
