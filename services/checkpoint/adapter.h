// A trainer's adapter file: what fine-tuning with LoRA leaves beside a base model.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

struct AdapterOptions {
  std::string path;
  absl::optional<double> alpha;  // Of LoRA, and then required: the trainer's settings have it, the file has not.
  std::string initial;           // Of PiSSA: the file of the initial factors; empty: none.
};

// Immutable, so any thread may read it. For a matrix X.weight [out, in] the file holds X.lora_A [r, in] and X.lora_B
// [out, r], with or without ".weight" or PEFT's ".default.weight" behind, or as web-rwkv names them X.lora.0 [in, r]
// and X.lora.1 [out, r]; X may be any dialect's. Merged, the weight is
//   W + B A * alpha / r                        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1
// PiSSA's factors began as parts of W, which a second file holds as X.init_lora_A and X.init_lora_B:
//   W - B0 A0 + B A                            Source: JL-er/RWKV-PEFT merge/merge_pissa.py
// DiSHA (Bone before) has X.disha or X.bone, D [r, out]:
//   W[o][i] + D[i mod r][o]                    Source: JL-er/RWKV-PEFT merge/merge_disha.py, dim == 2
// Its other tensors, small ones that were trained whole, take the place of the base's.
class Adapter {
 public:
  struct Update {
    std::string name;        // "blocks.0.att.key.weight"
    TensorRecord a;          // [r, in]; no name: there is none, as of b and the initial ones
    TensorRecord b;          // [out, r]
    TensorRecord initial_a;  // As a and b, in the second file
    TensorRecord initial_b;
    TensorRecord disha;  // [r, out], in place of a and b
    int64_t rank = 0;

    // The name in the file, for messages.
    const std::string& factor_name() const { return disha.name.empty() ? a.name : disha.name; }
    // Whether it changes a matrix of this shape.
    bool Fits(absl::Span<const int64_t> shape) const;
  };

  //   kInvalidArgument: not a checkpoint; half a pair; factors that do not fit each other or hold no numbers; nothing
  //   that changes a matrix; alpha missing, not positive and finite, or given where nothing has one.
  //   kUnimplemented: other kinds, named.
  static absl::StatusOr<std::unique_ptr<const Adapter>> Open(const AdapterOptions& options);

  const std::string& path() const { return path_; }
  const MappedFile& file() const { return *file_; }
  absl::Span<const Update> updates() const { return updates_; }                  // Sorted by name.
  absl::Span<const TensorRecord> replacements() const { return replacements_; }  // Sorted by name.

  // Adds the update to values[0 ..], the row-major elements from number `first` on of the base's [out, columns]. Every
  // element is summed in the same order for any division into calls. kDataLoss: the file has been cut.
  absl::Status AddTo(const Update& update, int64_t columns, int64_t first, absl::Span<float> values) const;

 private:
  Adapter(const AdapterOptions& options, std::unique_ptr<MappedFile> file, std::unique_ptr<MappedFile> initial);

  absl::Status ReadDirectory();
  absl::Status ReadInitial();
  absl::Status CheckAlpha() const;
  // AddTo of scale * (b a).
  absl::Status AddProduct(const MappedFile& file, const TensorRecord& a, const TensorRecord& b, float scale,
                          int64_t first, absl::Span<float> values) const;

  const std::string path_;
  const std::unique_ptr<MappedFile> file_;
  const std::unique_ptr<MappedFile> initial_;  // Null: none.
  const absl::optional<double> alpha_;
  std::vector<Update> updates_;
  std::vector<TensorRecord> replacements_;
};

}  // namespace rwkv::checkpoint
