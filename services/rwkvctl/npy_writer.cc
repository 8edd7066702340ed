#include "services/rwkvctl/npy_writer.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace rwkv::rwkvctl {

std::string NpyHeader(uint64_t rows, uint64_t columns) {
  constexpr size_t kPreambleBytes = 10;  // "\x93NUMPY", 2 bytes of version, 2 of the description's length.
  constexpr size_t kAlignment = 64;
  std::string description =
      absl::StrCat("{'descr': '<f4', 'fortran_order': False, 'shape': (", rows, ", ", columns, "), }");
  while ((kPreambleBytes + description.size() + 1) % kAlignment != 0) description.push_back(' ');
  description.push_back('\n');
  std::string header("\x93NUMPY\x01\x00", 8);
  header.push_back(static_cast<char>(description.size() & 0xFF));
  header.push_back(static_cast<char>(description.size() >> 8));
  return header + description;
}

absl::StatusOr<NpyWriter> NpyWriter::Create(const std::string& path, uint64_t rows, uint64_t columns) {
  absl::StatusOr<OutputFile> file = OutputFile::Create(path);
  if (!file.ok()) return file.status();
  if (absl::Status status = file->Write(NpyHeader(rows, columns)); !status.ok()) return status;
  return NpyWriter(*std::move(file), rows, columns);
}

absl::Status NpyWriter::Append(absl::string_view bytes) {
  const uint64_t row_bytes = columns_ * sizeof(float);
  if (bytes.size() % row_bytes != 0) {
    return absl::DataLossError(absl::StrCat(bytes.size(), " bytes are not whole rows of ", columns_, " numbers"));
  }
  written_rows_ += bytes.size() / row_bytes;
  if (written_rows_ > rows_) {
    return absl::DataLossError(absl::StrCat("row ", written_rows_ - 1, " is beyond the ", rows_, " expected"));
  }
  return file_.Write(bytes);
}

absl::Status NpyWriter::Finish() {
  if (written_rows_ != rows_) {
    return absl::DataLossError(absl::StrCat("only ", written_rows_, " of ", rows_, " rows came"));
  }
  return file_.Commit();
}

}  // namespace rwkv::rwkvctl
