#include "services/checkpoint/dialects/hugging_face_dialect.h"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/views.h"

namespace rwkv::checkpoint {
namespace {

enum class Change {
  kNone,
  kTranspose,   // [out, in] to [in, out]
  kMixDown,     // [5 * rank, width], r w k v g, to [width, 5 * rank], w k v r g
  kMixUp,       // [width, 5 * rank], r w k v g, to [5, rank, width], w k v r g
  kMixBiases,   // [5, width], r w k v g
  kMixFactors,  // [6, width], r w k v a g
};

struct Rule {
  absl::string_view port;  // A tensor's name, or a module's, behind which its tensors' stand.
  absl::string_view original;
  Change change = Change::kNone;
};

// fla: RWKV6ForCausalLM and RWKV7ForCausalLM, fla/models/rwkv{6,7}/ and fla/layers/rwkv{6,7}.py; the orders are those
// of utils/convert_from_rwkv6.py.
constexpr Rule kFlaGlobal[] = {
    {"embeddings", "emb"},
    {"lm_head", "head"},
    {"norm", "ln_out"},
};
// Longer ones before those they begin with.
constexpr Rule kFlaLayer[] = {
    {"pre_norm", "ln0"},
    {"attn_norm", "ln1"},
    {"ffn_norm", "ln2"},
    {"attn.r_proj.linear", "att.receptance"},
    {"attn.r_proj", "att.receptance"},
    {"attn.k_proj.linear", "att.key"},
    {"attn.k_proj", "att.key"},
    {"attn.v_proj.linear", "att.value"},
    {"attn.v_proj", "att.value"},
    {"attn.g_proj.linear", "att.gate"},
    {"attn.o_proj", "att.output"},
    {"attn.g_norm", "att.ln_x"},
    // RWKV-6
    {"attn.x_proj.0.mu", "att.time_maa_x"},
    {"attn.x_proj.0.linear.weight", "att.time_maa_w1", Change::kMixDown},
    {"attn.x_proj.2.weight", "att.time_maa_w2", Change::kMixUp},
    {"attn.x_bias", "att.time_maa_", Change::kMixBiases},
    {"attn.w_proj.linear.lora.0.weight", "att.time_decay_w1", Change::kTranspose},
    {"attn.w_proj.linear.lora.2.weight", "att.time_decay_w2", Change::kTranspose},
    {"attn.w_proj.linear.lora.2.bias", "att.time_decay"},
    {"attn.bonus", "att.time_faaaa"},
    {"ffn.key.linear", "ffn.key"},
    {"ffn.key.mu", "ffn.time_maa_k"},
    {"ffn.receptance.linear", "ffn.receptance"},
    {"ffn.receptance.mu", "ffn.time_maa_r"},
    // RWKV-7
    {"attn.x_x", "att.x_", Change::kMixFactors},
    {"attn.w_lora.lora.0.weight", "att.w1", Change::kTranspose},
    {"attn.w_lora.lora.2.weight", "att.w2", Change::kTranspose},
    {"attn.w_lora.lora.2.bias", "att.w0"},
    {"attn.a_lora.lora.0.weight", "att.a1", Change::kTranspose},
    {"attn.a_lora.lora.2.weight", "att.a2", Change::kTranspose},
    {"attn.a_lora.lora.2.bias", "att.a0"},
    {"attn.v_lora.lora.0.weight", "att.v1", Change::kTranspose},
    {"attn.v_lora.lora.2.weight", "att.v2", Change::kTranspose},
    {"attn.v_lora.lora.2.bias", "att.v0"},
    {"attn.g_lora.lora.0.weight", "att.g1", Change::kTranspose},
    {"attn.g_lora.lora.2.weight", "att.g2", Change::kTranspose},
    {"attn", "att"},  // x_r and the like, k_k, k_a, r_k
};

// transformers: models/rwkv/modeling_rwkv.py (RWKV-4); modeling_rwkv5.py and modeling_rwkv6.py of the models
// RWKV/rwkv-5-world-*, RWKV/rwkv-6-world-* and their like.
constexpr Rule kPortGlobal[] = {
    {"rwkv.embeddings", "emb"},
    {"embeddings", "emb"},
    {"rwkv.ln_out", "ln_out"},
    {"norm", "ln_out"},
    {"rwkv.head", "head"},
    {"lm_head", "head"},
};
constexpr Rule kPortLayer[] = {
    {"pre_ln", "ln0"},
    {"attention.time_mix_key", "att.time_mix_k"},
    {"attention.time_mix_value", "att.time_mix_v"},
    {"attention.time_mix_receptance", "att.time_mix_r"},
    {"attention.time_mix_gate", "att.time_mix_g"},
    {"attention", "att"},
    {"feed_forward.time_mix_key", "ffn.time_mix_k"},
    {"feed_forward.time_mix_receptance", "ffn.time_mix_r"},
    {"feed_forward", "ffn"},
};

// The rule for `name` or for a module that it is of.
const Rule* FindRule(absl::Span<const Rule> rules, absl::string_view name) {
  for (const Rule& rule : rules) {
    absl::string_view rest = name;
    if (absl::ConsumePrefix(&rest, rule.port) && (rest.empty() || rest[0] == '.')) return &rule;
  }
  return nullptr;
}

// `name` with the rule's module exchanged; as it is without a rule.
std::string Renamed(const Rule* rule, absl::string_view name) {
  if (rule == nullptr) return std::string(name);
  return absl::StrCat(rule->original, name.substr(rule->port.size()));
}

constexpr int kWkvrg[] = {1, 2, 3, 0, 4};  // Where each of w, k, v, r, g is in r, w, k, v, g.

absl::Status Apply(Change change, TensorRecord* record) {
  switch (change) {
    case Change::kTranspose:
      return Transpose(0, 1, record);
    case Change::kMixDown:
      RWKV_RETURN_IF_ERROR(Transpose(0, 1, record));
      return Reorder(1, kWkvrg, record);
    case Change::kMixUp:
      RWKV_RETURN_IF_ERROR(SplitDimension(1, 5, record));
      RWKV_RETURN_IF_ERROR(Transpose(0, 1, record));
      RWKV_RETURN_IF_ERROR(Transpose(1, 2, record));
      return Reorder(0, kWkvrg, record);
    default:
      return absl::OkStatus();
  }
}

absl::Status LayerToOriginal(absl::Span<const Rule> rules, const LayerName& name, TensorRecord record,
                             std::vector<TensorRecord>* out) {
  const Rule* rule = FindRule(rules, name.rest);
  const Change change = rule == nullptr ? Change::kNone : rule->change;
  if (change == Change::kMixBiases || change == Change::kMixFactors) {
    std::vector<std::string> names;
    for (const char letter : absl::string_view(change == Change::kMixBiases ? "rwkvg" : "rwkvag")) {
      names.push_back(BlockName(name.layer, absl::StrCat(rule->original, absl::string_view(&letter, 1))));
    }
    RWKV_ASSIGN_OR_RETURN(std::vector<TensorRecord> pieces, SplitFused(record, names));
    std::move(pieces.begin(), pieces.end(), std::back_inserter(*out));
    return absl::OkStatus();
  }
  RWKV_RETURN_IF_ERROR(Apply(change, &record));
  record.name = BlockName(name.layer, Renamed(rule, name.rest));
  out->push_back(std::move(record));
  return absl::OkStatus();
}

absl::Status ToOriginal(absl::Span<const Rule> global, absl::Span<const Rule> layer, absl::string_view layers,
                        std::vector<TensorRecord>* records) {
  std::vector<TensorRecord> out;
  for (TensorRecord& record : *records) {
    const std::string name = record.name;
    if (const absl::optional<LayerName> parsed = ParseLayerName(absl::StripPrefix(name, "rwkv."), layers)) {
      RWKV_RETURN_IF_ERROR(LayerToOriginal(layer, *parsed, std::move(record), &out));
    } else {
      record.name = Renamed(FindRule(global, name), name);
      out.push_back(std::move(record));
    }
  }
  *records = std::move(out);
  return absl::OkStatus();
}

bool AnyLayerHas(const std::vector<TensorRecord>& records, absl::string_view layers,
                 std::initializer_list<absl::string_view> modules) {
  return std::any_of(records.begin(), records.end(), [&](const TensorRecord& record) {
    const absl::optional<LayerName> name = ParseLayerName(absl::StripPrefix(record.name, "rwkv."), layers);
    return name.has_value() && std::any_of(modules.begin(), modules.end(), [&](absl::string_view module) {
             return absl::StartsWith(name->rest, module);
           });
  });
}

bool LooksLikeFla(const std::vector<TensorRecord>& records) {
  return AnyLayerHas(records, "layers.", {"attn.", "ffn."});
}

// Of the ports; some call a model's blocks its layers.
bool LooksLikePort(const std::vector<TensorRecord>& records, absl::string_view layers) {
  return AnyLayerHas(records, layers, {"attention.", "feed_forward."});
}

}  // namespace

bool LooksLikeHuggingFace(const std::vector<TensorRecord>& records) {
  return LooksLikeFla(records) || LooksLikePort(records, "blocks.") || LooksLikePort(records, "layers.");
}

absl::Status HuggingFaceToOriginal(std::vector<TensorRecord>* records) {
  if (LooksLikeFla(*records)) return ToOriginal(kFlaGlobal, kFlaLayer, "layers.", records);
  return ToOriginal(kPortGlobal, kPortLayer, LooksLikePort(*records, "layers.") ? "layers." : "blocks.", records);
}

}  // namespace rwkv::checkpoint
