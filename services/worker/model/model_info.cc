#include "services/worker/model/model_info.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/printable.h"
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

// "dir/model.safetensors" -> "model"; "dir/model-00001-of-00003.gguf" -> "model"; of a folder, or the index in it, the
// folder's name. Printable, because a file's name may be any bytes and a proto string may not.
std::string ModelName(absl::string_view path) {
  while (path.size() > 1 && absl::EndsWith(path, "/")) path.remove_suffix(1);
  if (absl::EndsWith(path, ".index.json") && absl::StrContains(path, '/')) path = path.substr(0, path.rfind('/'));
  absl::string_view name = path.substr(path.rfind('/') == absl::string_view::npos ? 0 : path.rfind('/') + 1);
  for (const absl::string_view ending : {".safetensors", ".pth", ".pt", ".st", ".bin", ".gguf"}) {
    if (name.size() > ending.size() && absl::ConsumeSuffix(&name, ending)) break;
  }
  constexpr absl::string_view kPart = "-00001-of-00003";
  const absl::string_view part = name.substr(name.size() - std::min(name.size(), kPart.size()));
  const auto is_digit_or = [](char c, char pattern) {
    return absl::ascii_isdigit(pattern) ? absl::ascii_isdigit(c) : c == pattern;
  };
  if (name.size() > kPart.size() && std::equal(part.begin(), part.end(), kPart.begin(), is_digit_or)) {
    name.remove_suffix(kPart.size());
  }
  return kernels::Printable(name);
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
