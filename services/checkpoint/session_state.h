// The recurrent state of a session in a file of its own: what `rwkvctl sessions export` writes, and tuned states, for a
// session to begin with. Files come from anybody.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/container.h"
#include "services/checkpoint/formats/mapped_file.h"

namespace rwkv::checkpoint {

// An exported state is a .safetensors file of fp32: blocks.N.NAME for each layer N and NAME of the model's state
// ("att.x_prev" [D], "att.state" [head, value, key], "ffn.x_prev" [D]), of all layers; it may have the session's log,
// too: token_ids, int32 [position]. In __metadata__:
//   position            tokens that the state has seen, decimal
//   model_fingerprint   of the model that computed it
//   initial_state       the tuned state that the session began with; missing or empty: the model's own
//   xxh3                SessionStateChecksum() of the payload; missing: not checked
// A tuned state is blocks.N.att.time_state [head, value, key] of all layers, of fp32, bf16 or fp16, in .safetensors or
// .pth, and nothing else (initial_state.h); the rest of the state is zeros, the position 0.
inline constexpr char kSessionTokensTensor[] = "token_ids";
inline constexpr int64_t kMaxSessionTokens = 1 << 19;               // In a file.
inline constexpr uint64_t kMaxSessionPosition = uint64_t{1} << 31;  // Tokens a state may have seen.
inline constexpr int64_t kMaxSessionInitialStateBytes = 128;

// XXH3-64 of the bytes behind a .safetensors file's header, as 16 lower-case hex digits.
std::string SessionStateChecksum(absl::Span<const absl::string_view> pieces);

// What a state has to fit.
struct StateModel {
  struct Tensor {
    std::string name;  // Without the layer: "att.x_prev".
    std::vector<int64_t> shape;
  };
  std::string fingerprint;
  int layer_count = 0;
  int64_t vocab_size = 0;
  std::vector<Tensor> layout;  // Of every layer, in the order of a record.

  int64_t RecordBytes() const;  // Of a layer, fp32.
  // No file that fits is larger: states, log, names.
  int64_t MaxFileBytes() const;
};

class SessionState {
 public:
  // Checks everything, and reads all of the file once for it.
  //   kFailedPrecondition: of another model; the message says what differs.
  //   kInvalidArgument: no such file; a tensor is missing, unknown, of another type or not finite; what it says of
  //   itself is malformed.  kDataLoss: it is cut, or its checksum is another.  kUnimplemented: compressed.
  static absl::StatusOr<std::unique_ptr<const SessionState>> Open(std::unique_ptr<const MappedFile> file,
                                                                  StateModel model);

  uint64_t position() const { return position_; }
  // All of the session's tokens up to there, or none: the file has no log.
  const std::vector<uint32_t>& token_ids() const { return token_ids_; }
  const std::string& initial_state() const { return initial_state_; }
  bool is_tuned() const { return is_tuned_; }

  // The state of a layer of the model, as state records have it: the layout's tensors one after the other, fp32.
  absl::StatusOr<std::string> Record(int layer) const;

 private:
  SessionState(std::unique_ptr<const MappedFile> file, StateModel model)
      : file_(std::move(file)), model_(std::move(model)) {}

  absl::Status Check();
  absl::Status CheckMetadata();
  absl::Status CheckTensors() const;
  absl::Status CheckFinite() const;
  absl::Status ReadTokens();
  const TensorRecord* Find(absl::string_view name) const;
  // The file's tensor that gives a layer this part of its state. Empty: zeros.
  std::string SourceName(int layer, const StateModel::Tensor& tensor) const;

  const std::unique_ptr<const MappedFile> file_;
  const StateModel model_;
  Container container_;
  bool is_tuned_ = false;
  uint64_t position_ = 0;
  std::string initial_state_;
  std::vector<uint32_t> token_ids_;
};

}  // namespace rwkv::checkpoint
