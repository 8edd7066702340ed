#include "services/checkpoint/dialects/gguf_dialect.h"

#include <cstdint>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/views.h"

namespace rwkv::checkpoint {
namespace {

enum class Change {
  kNone,
  kTranspose,       // [out, in] to [in, out]
  kTransposeLast,   // [5, out, in] to [5, in, out]
  kHeads,           // [A] to [H, N]
  kRescaledWeight,  // Divided by 2^(layer div rescale_every_n_layers)
};

struct Rule {
  absl::string_view gguf;
  absl::string_view original;
  Change change = Change::kNone;
};

constexpr Rule kGlobal[] = {
    {"token_embd.weight", "emb.weight"},           {"token_embd_norm.weight", "blocks.0.ln0.weight"},
    {"token_embd_norm.bias", "blocks.0.ln0.bias"}, {"output_norm.weight", "ln_out.weight"},
    {"output_norm.bias", "ln_out.bias"},           {"output.weight", "head.weight"},
};

// After "blk.N.". Source: llama.cpp gguf-py/gguf/tensor_mapping.py and constants.py.
constexpr Rule kBoth[] = {
    {"attn_norm.weight", "ln1.weight"},
    {"attn_norm.bias", "ln1.bias"},
    {"attn_norm_2.weight", "ln2.weight"},
    {"attn_norm_2.bias", "ln2.bias"},
    {"time_mix_receptance.weight", "att.receptance.weight"},
    {"time_mix_key.weight", "att.key.weight"},
    {"time_mix_value.weight", "att.value.weight"},
    {"time_mix_output.weight", "att.output.weight", Change::kRescaledWeight},
    {"time_mix_ln.weight", "att.ln_x.weight"},
    {"time_mix_ln.bias", "att.ln_x.bias"},
    {"channel_mix_key.weight", "ffn.key.weight"},
    {"channel_mix_value.weight", "ffn.value.weight", Change::kRescaledWeight},
};

constexpr Rule kVersion6[] = {
    {"time_mix_gate.weight", "att.gate.weight"},
    {"time_mix_lerp_x.weight", "att.time_maa_x"},
    {"time_mix_lerp_w.weight", "att.time_maa_w"},
    {"time_mix_lerp_k.weight", "att.time_maa_k"},
    {"time_mix_lerp_v.weight", "att.time_maa_v"},
    {"time_mix_lerp_r.weight", "att.time_maa_r"},
    {"time_mix_lerp_g.weight", "att.time_maa_g"},
    {"time_mix_w1.weight", "att.time_maa_w1", Change::kTranspose},
    {"time_mix_w2.weight", "att.time_maa_w2", Change::kTransposeLast},
    {"time_mix_decay.weight", "att.time_decay"},
    {"time_mix_decay_w1.weight", "att.time_decay_w1", Change::kTranspose},
    {"time_mix_decay_w2.weight", "att.time_decay_w2", Change::kTranspose},
    {"time_mix_first.weight", "att.time_faaaa"},
    {"channel_mix_lerp_k.weight", "ffn.time_maa_k"},
    {"channel_mix_lerp_r.weight", "ffn.time_maa_r"},
    {"channel_mix_receptance.weight", "ffn.receptance.weight"},
};

constexpr Rule kVersion7[] = {
    {"time_mix_w0.weight", "att.w0"},
    {"time_mix_w1.weight", "att.w1", Change::kTranspose},
    {"time_mix_w2.weight", "att.w2", Change::kTranspose},
    {"time_mix_a0.weight", "att.a0"},
    {"time_mix_a1.weight", "att.a1", Change::kTranspose},
    {"time_mix_a2.weight", "att.a2", Change::kTranspose},
    {"time_mix_v0.weight", "att.v0"},
    {"time_mix_v1.weight", "att.v1", Change::kTranspose},
    {"time_mix_v2.weight", "att.v2", Change::kTranspose},
    {"time_mix_g1.weight", "att.g1", Change::kTranspose},
    {"time_mix_g2.weight", "att.g2", Change::kTranspose},
    {"time_mix_k_k.weight", "att.k_k"},
    {"time_mix_k_a.weight", "att.k_a"},
    {"time_mix_r_k.weight", "att.r_k", Change::kHeads},
    {"channel_mix_lerp_k.weight", "ffn.x_k"},
};

constexpr absl::string_view kFused = "time_mix_lerp_fused.weight";

const Rule* FindRule(absl::Span<const Rule> rules, absl::string_view name) {
  for (const Rule& rule : rules) {
    if (rule.gguf == name) return &rule;
  }
  return nullptr;
}

// The whole number under `key`; `absent` if there is none. kInvalidArgument: not in [0, 2^30].
absl::StatusOr<int64_t> Number(const std::map<std::string, std::string>& metadata, const std::string& key,
                               int64_t absent) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) return absent;
  int64_t value = 0;
  if (!absl::SimpleAtoi(found->second, &value) || value < 0 || value > 1 << 30) {
    return absl::InvalidArgumentError(absl::StrCat("GGUF: ", key, " is ", Quoted(found->second)));
  }
  return value;
}

std::vector<std::string> FusedNames(bool is_version_7, int layer) {
  std::vector<std::string> names;
  for (const char letter : is_version_7 ? absl::string_view("rwkvag") : absl::string_view("wkvrg")) {
    names.push_back(
        BlockName(layer, absl::StrCat(is_version_7 ? "att.x_" : "att.time_maa_", absl::string_view(&letter, 1))));
  }
  return names;
}

absl::Status Apply(const Rule& rule, int layer, int64_t head_size, int64_t rescale, TensorRecord* record) {
  switch (rule.change) {
    case Change::kNone:
      return absl::OkStatus();
    case Change::kTranspose:
      return Transpose(0, 1, record);
    case Change::kTransposeLast:
      return Transpose(1, 2, record);
    case Change::kHeads: {
      const int64_t width = ElementCount(record->shape).value_or(0);
      if (head_size == 0 || width % head_size != 0) {
        return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(record->name), " has ", width,
                                                       " elements, but rwkv7.wkv.head_size is ", head_size));
      }
      return Reshape({width / head_size, head_size}, record);
    }
    case Change::kRescaledWeight:
      if (rescale > 0) record->exponent = static_cast<int>(layer / rescale);
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

int Hex(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The inside of Python's bytes repr. False if it ends in the middle of an escape or one is not hexadecimal.
bool Unescape(absl::string_view text, std::string* out) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\') {
      out->push_back(text[i]);
      continue;
    }
    if (++i == text.size()) return false;
    switch (text[i]) {
      case 't':
        out->push_back('\t');
        break;
      case 'n':
        out->push_back('\n');
        break;
      case 'r':
        out->push_back('\r');
        break;
      case 'x': {
        if (text.size() - i < 3 || Hex(text[i + 1]) < 0 || Hex(text[i + 2]) < 0) return false;
        out->push_back(static_cast<char>(Hex(text[i + 1]) * 16 + Hex(text[i + 2])));
        i += 2;
        break;
      }
      default:
        out->push_back(text[i]);
        break;
    }
  }
  return true;
}

}  // namespace

absl::Status GgufToOriginal(const std::map<std::string, std::string>& metadata, std::vector<TensorRecord>* records) {
  const auto found = metadata.find("general.architecture");
  const std::string architecture = found == metadata.end() ? "" : found->second;
  if (architecture != "rwkv6" && architecture != "rwkv7") {
    return absl::UnimplementedError(
        absl::StrCat("a GGUF file of the architecture ", Quoted(architecture), "; read are \"rwkv6\" and \"rwkv7\""));
  }
  const bool is_version_7 = architecture == "rwkv7";
  RWKV_ASSIGN_OR_RETURN(const int64_t head_size, Number(metadata, absl::StrCat(architecture, ".wkv.head_size"), 0));
  RWKV_ASSIGN_OR_RETURN(const int64_t rescale,
                        Number(metadata, absl::StrCat(architecture, ".rescale_every_n_layers"), 0));

  std::vector<TensorRecord> out;
  for (TensorRecord& record : *records) {
    const absl::optional<LayerName> name = ParseLayerName(record.name, "blk.");
    if (!name.has_value()) {
      if (const Rule* rule = FindRule(kGlobal, record.name)) record.name = std::string(rule->original);
      out.push_back(std::move(record));
      continue;
    }
    const int layer = name->layer;
    if (name->rest == kFused) {
      RWKV_ASSIGN_OR_RETURN(std::vector<TensorRecord> pieces, SplitFused(record, FusedNames(is_version_7, layer)));
      std::move(pieces.begin(), pieces.end(), std::back_inserter(out));
      continue;
    }
    const Rule* rule = FindRule(kBoth, name->rest);
    if (rule == nullptr) {
      rule = is_version_7 ? FindRule(kVersion7, name->rest) : FindRule(kVersion6, name->rest);
    }
    if (rule != nullptr) {
      // Layer 0 has no value residual; the converter fills its place with copies of a0, a1 and a2.
      if (layer == 0 && (rule->original == "att.v0" || rule->original == "att.v1" || rule->original == "att.v2")) {
        continue;
      }
      RWKV_RETURN_IF_ERROR(Apply(*rule, layer, head_size, rescale, &record));
      record.name = BlockName(layer, rule->original);
    }
    out.push_back(std::move(record));
  }
  *records = std::move(out);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> GgufVocabulary(const std::map<std::string, std::string>& metadata,
                                                        absl::Span<const absl::string_view> tokens,
                                                        absl::Span<const int32_t> types) {
  const auto model = metadata.find("tokenizer.ggml.model");
  if (model == metadata.end() || model->second != "rwkv") {
    return absl::UnimplementedError(absl::StrCat("GGUF: a tokenizer of the kind ",
                                                 Quoted(model == metadata.end() ? "" : model->second),
                                                 "; only \"rwkv\" is read"));
  }
  constexpr int32_t kNormal = 1;  // llama.h, "enum llama_token_type"
  std::vector<std::string> out(tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (types.empty() ? id == 0 : types[id] != kNormal) continue;
    if (!Unescape(tokens[id], &out[id])) {
      return absl::InvalidArgumentError(
          absl::StrCat("GGUF: token ", id, ", ", Quoted(tokens[id]), ", ends inside an escape"));
    }
  }
  return out;
}

}  // namespace rwkv::checkpoint
