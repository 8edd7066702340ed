// A file that appears whole or not at all: written beside its place, then renamed into it.
#pragma once

#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::rwkvctl {

class OutputFile {
 public:
  // kInvalidArgument: something is at the path that is no regular file (a folder, a device, a pipe). Else the error of
  // the system, naming the path (kNotFound, kPermissionDenied, kResourceExhausted for a full disk, ...).
  static absl::StatusOr<OutputFile> Create(const std::string& path);
  OutputFile(OutputFile&&) = default;
  ~OutputFile();  // Without Commit, nothing is left.

  absl::Status Write(absl::string_view bytes);
  absl::Status Commit();

 private:
  OutputFile(std::string path, std::string temporary_path, std::FILE* file)
      : path_(std::move(path)), temporary_path_(std::move(temporary_path)), file_(file, &std::fclose) {}
  absl::Status Error(absl::string_view what) const;

  std::string path_;
  std::string temporary_path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

}  // namespace rwkv::rwkvctl
