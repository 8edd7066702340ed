#include "services/rwkvctl/inspect_command.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "kernels/base/printable.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "services/rwkvctl/json.h"

namespace rwkv::rwkvctl {
namespace {

using checkpoint::Checkpoint;
using checkpoint::ModelConfig;
using checkpoint::Size;

std::string Metadata(const Checkpoint& checkpoint, const std::string& key) {
  const auto found = checkpoint.metadata().find(key);
  return found == checkpoint.metadata().end() ? "" : found->second;
}

// By what the file brings, else by the rows of the embedding: 65536 in every World model; 50277, or that padded to
// 50304, in Pile and Raven models.
std::string TokenizerName(const Checkpoint& checkpoint, int64_t vocab_size) {
  if (const std::string model = Metadata(checkpoint, "tokenizer.ggml.model"); !model.empty() && model != "rwkv") {
    return model;
  }
  if (const std::string file = Metadata(checkpoint, "vocabulary"); !file.empty()) return file;
  if (vocab_size == 65536) return "world";
  if (vocab_size == 50277 || vocab_size == 50304) return "neox";
  return Metadata(checkpoint, "tokenizer.ggml.model").empty() ? "unknown" : "in the file";
}

std::string TemplateName(const Checkpoint& checkpoint) {
  const std::string own = Metadata(checkpoint, "template");
  return own.empty() ? Metadata(checkpoint, "tokenizer.chat_template") : own;
}

// Of one sequence; what RWKV-7b keeps per token besides is not in it.
int64_t StateBytes(const ModelConfig& config) {
  const int64_t recurrent = config.head_size == 0 ? 3 * config.attention_width  // RWKV-4's aa, bb, pp
                                                  : config.attention_width * config.head_size;
  return config.layer_count * (2 * config.width + recurrent) * static_cast<int64_t>(sizeof(float));
}

// The low-rank widths of the last layer, which has all of them: {"decay": 64, ...}.
Json Ranks(const ModelConfig& config) {
  constexpr std::pair<const char*, Size> kRanks[] = {
      {"mix", Size::kMixRank},   {"decay", Size::kDecayRank},
      {"iclr", Size::kIclrRank}, {"value_residual", Size::kValueResidualRank},
      {"gate", Size::kGateRank}, {"deep_embed", Size::kDeepEmbedWidth},
  };
  Json ranks = Json::object();
  for (const auto& [name, size] : kRanks) {
    if (const int64_t value = config.layer_sizes.back()[size]; value != 0) ranks[name] = value;
  }
  return ranks;
}

Json Describe(const Checkpoint& checkpoint, const ModelConfig& config) {
  Json json;
  json["format"] = std::string(checkpoint.format());
  json["dialect"] = checkpoint.dialect().empty() ? "original" : std::string(checkpoint.dialect());
  json["version"] = std::string(checkpoint::Name(config.version));
  json["layers"] = config.layer_count;
  json["width"] = config.width;
  json["attention_width"] = config.attention_width;
  json["heads"] = config.head_count;
  json["head_size"] = config.head_size;
  json["ffn"] = config.ffn_width;
  json["vocab"] = config.vocab_size;
  json["dtype"] = config.dtype;
  json["ranks"] = Ranks(config);
  json["parameters"] = config.parameters;
  json["tokenizer"] = TokenizerName(checkpoint, config.vocab_size);
  json["template"] = TemplateName(checkpoint);
  json["tuned_states"] = config.has_initial_state;
  json["state_bytes"] = StateBytes(config);
  json["file_bytes"] = checkpoint.file_bytes();
  return json;
}

std::string Text(const Json& value) {
  if (value.is_string()) {
    const std::string text = kernels::Printable(value.get<std::string>());  // A template has line breaks.
    return text.empty() ? "-" : text;
  }
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (!value.is_object()) return value.dump();
  std::vector<std::string> parts;
  for (const auto& [name, rank] : value.items()) parts.push_back(absl::StrCat(name, " ", rank.dump()));
  return parts.empty() ? "-" : absl::StrJoin(parts, ", ");
}

class InspectCommand : public Command {
 public:
  absl::string_view name() const override { return "inspect"; }
  absl::string_view arguments() const override { return "FILE"; }
  absl::string_view summary() const override { return "says what a checkpoint file is"; }
  absl::string_view details() const override {
    return "FILE is .pth, .safetensors (names of RWKV-LM, Hugging Face, fla or web-rwkv), GGUF or rwkv.cpp's .bin; it\n"
           "is told by its content, and only its directory is read. Of a model in several files: its folder, its\n"
           "index (.index.json) or one of its parts (-00001-of-0000N.gguf). No router is asked.\n";
  }
  bool needs_router() const override { return false; }

  void AddFlags(FlagSet& flags) override {
    flags.AddBool("json", "print one JSON object", &json_);
    flags.AddBool("ignore-extra-tensors", "take a file with tensors that are no part of the model",
                  &ignore_extra_tensors_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (positional.size() != 1) return absl::InvalidArgumentError("exactly one FILE is needed");
    path_ = positional[0];
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    RWKV_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(path_));
    RWKV_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::FromCheckpoint(*checkpoint, ignore_extra_tensors_));
    const Json json = Describe(*checkpoint, config);
    for (const std::string& note : checkpoint::Notes(*checkpoint, config)) {
      context.err << "note: " << note << std::endl;
    }
    if (json_) {
      context.out << DumpLine(json);
      return absl::OkStatus();
    }
    for (const auto& [name, value] : json.items()) {
      std::string line = name;
      line.resize(17, ' ');
      context.out << line << Text(value) << "\n";
    }
    return absl::OkStatus();
  }

 private:
  bool json_ = false;
  bool ignore_extra_tensors_ = false;
  std::string path_;
};

}  // namespace

std::unique_ptr<Command> MakeInspectCommand() { return std::make_unique<InspectCommand>(); }

}  // namespace rwkv::rwkvctl
