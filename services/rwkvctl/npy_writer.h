// NumPy's .npy, version 1.0: a matrix of float32, row by row.
// Source: numpy/lib/format.py, "Format Version 1.0".
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/rwkvctl/output_file.h"

namespace rwkv::rwkvctl {

// Magic, version, length and a description padded so that the data starts at a multiple of 64 bytes.
std::string NpyHeader(uint64_t rows, uint64_t columns);

class NpyWriter {
 public:
  static absl::StatusOr<NpyWriter> Create(const std::string& path, uint64_t rows, uint64_t columns);

  // Whole rows of little-endian float32, in order. kDataLoss: half a row, or more rows than were announced.
  absl::Status Append(absl::string_view bytes);
  // kDataLoss: rows are missing. Until it returns OK there is no file at `path`.
  absl::Status Finish();

 private:
  NpyWriter(OutputFile file, uint64_t rows, uint64_t columns)
      : file_(std::move(file)), rows_(rows), columns_(columns) {}

  OutputFile file_;
  uint64_t rows_;
  uint64_t columns_;
  uint64_t written_rows_ = 0;
};

}  // namespace rwkv::rwkvctl
