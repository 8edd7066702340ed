#include "services/worker/model/model_info.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::worker {
namespace {

// The number of rows of the embedding tells the tokenizer. World models have more rows than tokens (65,530); some
// models of the Pile were padded to a multiple of 128.
absl::string_view TokenizerOf(int64_t vocab_size) {
  switch (vocab_size) {
    case 65536:
      return "world";
    case 50277:
    case 50304:
      return "neox";
    default:
      return "";
  }
}

// "dir/model.safetensors" -> "model". Escaped, because a file's name may be any bytes and a proto string may not.
std::string ModelName(absl::string_view path) {
  absl::string_view name = path.substr(path.rfind('/') == absl::string_view::npos ? 0 : path.rfind('/') + 1);
  const size_t dot = name.rfind('.');
  return absl::CHexEscape(dot == absl::string_view::npos || dot == 0 ? name : name.substr(0, dot));
}

// What the file says of its chat template: in safetensors under "template", in GGUF under llama.cpp's key. Empty if it
// is nothing to go by: too long, or not ASCII (a proto string has to be UTF-8, a file's may be any bytes).
std::string ChatTemplateOf(const std::map<std::string, std::string>& metadata) {
  constexpr size_t kMaxBytes = 16 << 10;
  for (const char* const key : {"template", "tokenizer.chat_template"}) {
    const auto it = metadata.find(key);
    if (it == metadata.end() || it->second.size() > kMaxBytes) continue;
    if (std::all_of(it->second.begin(), it->second.end(), absl::ascii_isascii)) return it->second;
  }
  return "";
}

}  // namespace

absl::StatusOr<v1::ModelInfo> MakeModelInfo(const checkpoint::Checkpoint& checkpoint,
                                            const checkpoint::ModelConfig& config) {
  v1::ModelInfo info;
  info.set_chat_template(ChatTemplateOf(checkpoint.metadata()));
  RWKV_ASSIGN_OR_RETURN(std::string fingerprint, checkpoint::Fingerprint(checkpoint));
  info.set_name(ModelName(checkpoint.path()));
  info.set_fingerprint(std::move(fingerprint));
  info.set_version(std::string(checkpoint::Name(config.version)));
  info.set_layer_count(config.layer_count);
  info.set_width(static_cast<int32_t>(config.width));
  info.set_head_count(static_cast<int32_t>(config.head_count));
  info.set_head_size(static_cast<int32_t>(config.head_size));
  info.set_ffn_width(static_cast<int32_t>(config.ffn_width));
  info.set_vocab_size(static_cast<int32_t>(config.vocab_size));
  info.set_dtype(config.dtype);
  info.set_tokenizer(std::string(TokenizerOf(config.vocab_size)));
  info.set_parameters(config.parameters);
  return info;
}

}  // namespace rwkv::worker
