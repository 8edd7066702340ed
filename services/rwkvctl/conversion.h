// A checkpoint's tensors in another precision, tensor by tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/rwkvctl/safetensors_writer.h"

namespace rwkv::rwkvctl {

enum class Precision { kAsStored, kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// "fp32", "bf16", "fp16", "int8", "int4". kInvalidArgument: none of them.
absl::StatusOr<Precision> ParsePrecision(absl::string_view name);

// Names and shapes stay. What changes:
//   kAsStored            nothing; quantized matrices stay so
//   kFloat32             every weight (exact)
//   kBFloat16, kFloat16  every matrix, rounded to nearest; vectors, norms and states keep their type
//   kInt8, kInt4         the matrices that each token is multiplied by (checkpoint/matrix_names.h): X, X.scale and, of
//                        int4, X.min in groups of 64; the rest keeps its type, and so do, in int4, odd rows
// Quantized matrices that are to become something else are first taken back to fp32 (exact).
class Conversion {
 public:
  // Reads no weight. kFailedPrecondition: a tensor that is quantized, but not as this project does.
  // `left_out`: sorted names.
  static absl::StatusOr<Conversion> Plan(std::shared_ptr<const checkpoint::Checkpoint> checkpoint, Precision precision,
                                         const std::vector<std::string>& left_out = {});

  const std::vector<TensorHeader>& tensors() const { return headers_; }  // In the order that Write appends them.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  int64_t bytes() const { return bytes_; }  // Of all tensors.

  using AppendFunction = std::function<absl::Status(absl::string_view)>;
  // All tensors' bytes, a megabyte or so at a time; besides, memory is needed for one matrix's scales.
  //   kDataLoss: a weight is not finite. kOutOfRange: one is too large for the precision. Errors of `append` unchanged.
  absl::Status Write(const AppendFunction& append) const;

 private:
  enum class Action { kCopy, kNarrow, kQuantize };
  struct Step {
    const checkpoint::TensorInfo* info = nullptr;
    const checkpoint::TensorInfo* scale = nullptr;  // Not null: info is quantized.
    const checkpoint::TensorInfo* minimum = nullptr;
    Action action = Action::kCopy;
    checkpoint::ElementType type = checkpoint::ElementType::kFloat32;  // kNarrow only.
  };
  // The quantized matrix `step` reads from, its scales in memory.
  struct Codes;

  Conversion(std::shared_ptr<const checkpoint::Checkpoint> checkpoint, Precision precision)
      : checkpoint_(std::move(checkpoint)), precision_(precision) {}

  absl::Status PlanAll(const std::vector<std::string>& left_out);
  void AddStep(const Step& step);
  void AddHeader(const std::string& name, checkpoint::ElementType type, std::vector<int64_t> shape);
  absl::Status ReadCodes(const Step& step, Codes* codes) const;
  absl::Status ReadRows(const Step& step, const Codes& codes, int64_t first, int64_t count, float* out) const;
  absl::Status Copy(const checkpoint::TensorInfo& info, const AppendFunction& append) const;
  absl::Status WriteStep(const Step& step, const AppendFunction& append) const;

  std::shared_ptr<const checkpoint::Checkpoint> checkpoint_;
  Precision precision_;
  std::vector<Step> steps_;
  std::vector<TensorHeader> headers_;
  std::map<std::string, std::string> metadata_;
  int64_t bytes_ = 0;
};

}  // namespace rwkv::rwkvctl
