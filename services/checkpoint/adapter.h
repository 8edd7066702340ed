// A trainer's adapter file: what fine-tuning with LoRA leaves beside a base model.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// Immutable, so any thread may read it. For a matrix X.weight [out, in] the file holds X.lora_A [r, in] and X.lora_B
// [out, r], with or without ".weight" or PEFT's ".default.weight" behind, or as web-rwkv names them X.lora.0 [in, r]
// and X.lora.1 [out, r]; X may be any dialect's. Merged, the weight is
//   W + B A * alpha / r                        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1
// Its other tensors, small ones that were trained whole, take the place of the base's.
class Adapter {
 public:
  struct Update {
    std::string name;  // "blocks.0.att.key.weight"
    TensorRecord a;    // [r, in]
    TensorRecord b;    // [out, r]
    int64_t rank = 0;
  };

  // `alpha` is not in the file; the trainer's settings have it.
  //   kInvalidArgument: alpha is not positive and finite; not a checkpoint; half a pair; factors that do not fit each
  //   other or hold no numbers; no pair at all. kUnimplemented: PiSSA, DiSHA, Bone and other kinds, named.
  static absl::StatusOr<std::unique_ptr<const Adapter>> Open(const std::string& path, double alpha);

  const std::string& path() const { return path_; }
  const MappedFile& file() const { return *file_; }
  absl::Span<const Update> updates() const { return updates_; }                  // Sorted by name.
  absl::Span<const TensorRecord> replacements() const { return replacements_; }  // Sorted by name.

  // Adds the update to values[0 ..], the row-major elements from number `first` on of the base's [out, in]. Every
  // element is summed in the same order for any division into calls. kDataLoss: the file has been cut.
  absl::Status AddTo(const Update& update, int64_t first, absl::Span<float> values) const;

 private:
  Adapter(std::string path, std::unique_ptr<MappedFile> file, double alpha);

  absl::Status ReadDirectory();

  const std::string path_;
  const std::unique_ptr<MappedFile> file_;
  const double alpha_;
  std::vector<Update> updates_;
  std::vector<TensorRecord> replacements_;
};

}  // namespace rwkv::checkpoint
