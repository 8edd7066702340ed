#include "services/checkpoint/dialects/hugging_face_dialect.h"

#include <algorithm>
#include <string>

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

struct Rule {
  absl::string_view port;
  absl::string_view original;
};

// fla: RWKV7ForCausalLM, fla/models/rwkv7/modeling_rwkv7.py and fla/layers/rwkv7.py.
constexpr Rule kFlaGlobal[] = {
    {"embeddings.weight", "emb.weight"},
    {"lm_head.weight", "head.weight"},
    {"norm.weight", "ln_out.weight"},
    {"norm.bias", "ln_out.bias"},
};
constexpr Rule kFlaLayer[] = {
    {"pre_norm.weight", "ln0.weight"},
    {"pre_norm.bias", "ln0.bias"},
    {"attn_norm.weight", "ln1.weight"},
    {"attn_norm.bias", "ln1.bias"},
    {"ffn_norm.weight", "ln2.weight"},
    {"ffn_norm.bias", "ln2.bias"},
    {"attn.r_proj.weight", "att.receptance.weight"},
    {"attn.k_proj.weight", "att.key.weight"},
    {"attn.v_proj.weight", "att.value.weight"},
    {"attn.o_proj.weight", "att.output.weight"},
    {"attn.g_norm.weight", "att.ln_x.weight"},
    {"attn.g_norm.bias", "att.ln_x.bias"},
};

// transformers: models/rwkv/modeling_rwkv.py (RWKV-4), and the RWKV-5 and 6 ports made after it.
constexpr Rule kPortGlobal[] = {
    {"rwkv.embeddings.weight", "emb.weight"}, {"rwkv.ln_out.weight", "ln_out.weight"},
    {"rwkv.ln_out.bias", "ln_out.bias"},      {"embeddings.weight", "emb.weight"},
    {"lm_head.weight", "head.weight"},
};
constexpr Rule kPortTokenShift[] = {
    {"time_mix_key", "time_mix_k"},
    {"time_mix_value", "time_mix_v"},
    {"time_mix_receptance", "time_mix_r"},
    {"time_mix_gate", "time_mix_g"},
};

// The original name, or `name` where there is no rule.
absl::string_view Renamed(absl::Span<const Rule> rules, absl::string_view name) {
  for (const Rule& rule : rules) {
    if (rule.port == name) return rule.original;
  }
  return name;
}

// "attn.w_lora.lora.0.weight" [rank, D] is w1 [D, rank]; lora.2 has w2 and, as its bias, w0.
absl::Status ChangeFlaLowRank(absl::string_view rest, int layer, TensorRecord* record) {
  if (!absl::ConsumePrefix(&rest, "attn.") || rest.empty()) return absl::OkStatus();
  const absl::string_view letter = rest.substr(0, 1);
  rest.remove_prefix(1);
  if (!absl::StrContains("wavg", letter) || !absl::ConsumePrefix(&rest, "_lora.lora.")) return absl::OkStatus();
  const absl::string_view number = rest == "0.weight" ? "1" : rest == "2.weight" ? "2" : rest == "2.bias" ? "0" : "";
  if (number.empty()) return absl::OkStatus();
  record->name = BlockName(layer, absl::StrCat("att.", letter, number));
  return number == "0" ? absl::OkStatus() : Transpose(0, 1, record);
}

absl::Status FlaToOriginal(std::vector<TensorRecord>* records) {
  if (AnyNameEndsWith(*records, ".attn.x_proj.2.weight")) {
    return absl::UnimplementedError(
        "fla's RWKV-6 mixes its tokens in another order than the original; use the original checkpoint");
  }
  for (TensorRecord& record : *records) {
    const std::string name = record.name;
    const absl::optional<LayerName> layer = ParseLayerName(name, "layers.");
    if (!layer.has_value()) {
      record.name = std::string(Renamed(kFlaGlobal, name));
      continue;
    }
    absl::string_view rest = Renamed(kFlaLayer, layer->rest);
    if (absl::ConsumePrefix(&rest, "attn.")) {
      record.name = BlockName(layer->layer, absl::StrCat("att.", rest));  // x_*, k_k, k_a, r_k
    } else {
      record.name = BlockName(layer->layer, rest);
    }
    RWKV_RETURN_IF_ERROR(ChangeFlaLowRank(layer->rest, layer->layer, &record));
  }
  return absl::OkStatus();
}

void PortToOriginal(std::vector<TensorRecord>* records) {
  for (TensorRecord& record : *records) {
    const std::string name = record.name;
    const absl::optional<LayerName> layer = ParseLayerName(absl::StripPrefix(name, "rwkv."), "blocks.");
    if (!layer.has_value()) {
      record.name = std::string(Renamed(kPortGlobal, name));
      continue;
    }
    absl::string_view rest = layer->rest;
    std::string renamed;
    if (absl::ConsumePrefix(&rest, "attention.")) {
      renamed = absl::StrCat("att.", Renamed(kPortTokenShift, rest));
    } else if (absl::ConsumePrefix(&rest, "feed_forward.")) {
      renamed = absl::StrCat("ffn.", Renamed(kPortTokenShift, rest));
    } else if (absl::ConsumePrefix(&rest, "pre_ln.")) {
      renamed = absl::StrCat("ln0.", rest);
    } else {
      renamed = std::string(rest);
    }
    record.name = BlockName(layer->layer, renamed);
  }
}

bool AnyLayerHas(const std::vector<TensorRecord>& records, absl::string_view prefix, absl::string_view rest) {
  return std::any_of(records.begin(), records.end(), [&](const TensorRecord& record) {
    const absl::optional<LayerName> name = ParseLayerName(absl::StripPrefix(record.name, "rwkv."), prefix);
    return name.has_value() && absl::StartsWith(name->rest, rest);
  });
}

bool LooksLikeFla(const std::vector<TensorRecord>& records) { return AnyLayerHas(records, "layers.", "attn."); }

}  // namespace

bool LooksLikeHuggingFace(const std::vector<TensorRecord>& records) {
  return LooksLikeFla(records) || AnyLayerHas(records, "blocks.", "attention.");
}

absl::Status HuggingFaceToOriginal(std::vector<TensorRecord>* records) {
  if (LooksLikeFla(*records)) return FlaToOriginal(records);
  PortToOriginal(records);
  return absl::OkStatus();
}

}  // namespace rwkv::checkpoint
