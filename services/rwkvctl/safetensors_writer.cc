#include "services/rwkvctl/safetensors_writer.h"

#include <algorithm>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/output_file.h"

namespace rwkv::rwkvctl {
namespace {

// Of fp32, or kMaxBytes + 1 for a shape that is negative or too large.
uint64_t ShapeBytes(const std::vector<int64_t>& shape) {
  uint64_t bytes = sizeof(float);
  for (int64_t dimension : shape) {
    if (dimension < 0) return TensorCollector::kMaxBytes + 1;
    if (dimension != 0 && bytes > TensorCollector::kMaxBytes / static_cast<uint64_t>(dimension)) {
      return TensorCollector::kMaxBytes + 1;
    }
    bytes *= static_cast<uint64_t>(dimension);
  }
  return bytes;
}

}  // namespace

absl::Status TensorCollector::Add(const std::string& name, const std::vector<int64_t>& shape, uint64_t offset_bytes,
                                  absl::string_view data) {
  // From the end: a piece nearly always belongs to the tensor that came last.
  auto found = std::find_if(tensors_.rbegin(), tensors_.rend(), [&](const Tensor& t) { return t.name == name; });
  if (found == tensors_.rend()) {
    total_bytes_ += ShapeBytes(shape);
    if (total_bytes_ > kMaxBytes) {
      return absl::DataLossError(absl::StrCat("with tensor ", name, " the state is over ", kMaxBytes, " bytes"));
    }
    tensors_.push_back({name, shape, ""});
    found = tensors_.rbegin();
  }
  Tensor& tensor = *found;
  if (tensor.shape != shape) return absl::DataLossError(absl::StrCat("tensor ", name, " changes its shape"));
  if (tensor.data.size() != offset_bytes) {
    return absl::DataLossError(
        absl::StrCat("tensor ", name, " goes on at byte ", offset_bytes, " after ", tensor.data.size()));
  }
  if (data.size() > ShapeBytes(shape) - tensor.data.size()) {
    return absl::DataLossError(absl::StrCat("tensor ", name, " has more than its ", ShapeBytes(shape), " bytes"));
  }
  tensor.data.append(data.data(), data.size());
  return absl::OkStatus();
}

absl::Status TensorCollector::Finish() const {
  if (tensors_.empty()) return absl::DataLossError("the state has no tensors");
  for (const Tensor& tensor : tensors_) {
    if (tensor.data.size() == ShapeBytes(tensor.shape)) continue;
    return absl::DataLossError(absl::StrCat("tensor ", tensor.name, " ends after ", tensor.data.size(), " of ",
                                            ShapeBytes(tensor.shape), " bytes"));
  }
  return absl::OkStatus();
}

std::string SafetensorsHeader(const std::vector<TensorHeader>& tensors,
                              const std::map<std::string, std::string>& metadata) {
  Json json = Json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const TensorHeader& tensor : tensors) {
    const uint64_t end = offset + tensor.bytes;
    json[tensor.name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string header;
  for (int byte = 0; byte < 8; ++byte) header.push_back(static_cast<char>(text.size() >> (8 * byte) & 0xFF));
  return header + text;
}

absl::StatusOr<uint64_t> WriteSafetensors(const std::string& path, const std::vector<Tensor>& tensors,
                                          const std::map<std::string, std::string>& metadata) {
  absl::StatusOr<OutputFile> file = OutputFile::Create(path);
  if (!file.ok()) return file.status();
  std::vector<TensorHeader> headers;
  for (const Tensor& tensor : tensors) headers.push_back({tensor.name, tensor.dtype, tensor.shape, tensor.data.size()});
  const std::string header = SafetensorsHeader(headers, metadata);
  uint64_t bytes = header.size();
  if (absl::Status status = file->Write(header); !status.ok()) return status;
  for (const Tensor& tensor : tensors) {
    bytes += tensor.data.size();
    if (absl::Status status = file->Write(tensor.data); !status.ok()) return status;
  }
  if (absl::Status status = file->Commit(); !status.ok()) return status;
  return bytes;
}

}  // namespace rwkv::rwkvctl
