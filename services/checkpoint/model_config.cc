#include "services/checkpoint/model_config.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::checkpoint {
namespace {

// The N of "blocks.N.rest"; nothing for other names. Plain decimal, so that no two names mean one layer.
absl::optional<int> LayerOfName(absl::string_view name) {
  if (!absl::ConsumePrefix(&name, "blocks.")) return absl::nullopt;
  const absl::string_view digits = name.substr(0, std::min(name.find('.'), name.size()));
  int layer = 0;
  if (digits.empty() || digits.size() > 6 || digits.size() == name.size() || (digits[0] == '0' && digits.size() > 1) ||
      !std::all_of(digits.begin(), digits.end(), absl::ascii_isdigit) || !absl::SimpleAtoi(digits, &layer)) {
    return absl::nullopt;
  }
  return layer;
}

// One past the largest layer of which there is a tensor.
int CountLayers(const Checkpoint& checkpoint) {
  int count = 0;
  for (const TensorInfo& info : checkpoint.tensors()) count = std::max(count, LayerOfName(info.name).value_or(-1) + 1);
  return count;
}

bool AnyNameHas(const Checkpoint& checkpoint, absl::string_view part) {
  return std::any_of(checkpoint.tensors().begin(), checkpoint.tensors().end(),
                     [part](const TensorInfo& info) { return absl::StrContains(info.name, part); });
}

bool OnlyTunedStates(const Checkpoint& checkpoint) {
  return std::all_of(checkpoint.tensors().begin(), checkpoint.tensors().end(),
                     [](const TensorInfo& info) { return absl::EndsWith(info.name, ".att.time_state"); });
}

// Buffers that training needs and inference does not. Source: BlinkDL/RWKV-LM RWKV-v4/src/model.py (copy_mask of
// RWKV_HEAD_QK_DIM), PyTorch's batch norms, transformers' rotary embeddings.
bool IsLeftByTrainers(absl::string_view name) {
  for (const absl::string_view ending : {"copy_mask", ".num_batches_tracked", ".inv_freq"}) {
    if (absl::EndsWith(name, ending)) return true;
  }
  return false;
}

absl::Status Recognised(absl::string_view what) {
  return absl::UnimplementedError(absl::StrCat(what, " is recognised, but not supported"));
}

// 5.2 has a decay for each channel, 5.0 and 5.1 one for each head.
bool HasChannelDecay(const Checkpoint& checkpoint) {
  return std::any_of(checkpoint.tensors().begin(), checkpoint.tensors().end(), [](const TensorInfo& info) {
    return absl::EndsWith(info.name, ".att.time_decay") && !info.shape.empty() &&
           *ElementCount(info.shape) > info.shape[0];
  });
}

// RWKV-3 has the names of RWKV-4, but its decay is a column.
bool HasColumnDecay(const Checkpoint& checkpoint) {
  return std::any_of(checkpoint.tensors().begin(), checkpoint.tensors().end(), [](const TensorInfo& info) {
    return absl::EndsWith(info.name, ".att.time_decay") && info.shape.size() == 2 && info.shape[0] > 1 &&
           info.shape[1] == 1;
  });
}

// The names tell the version. They are looked for in any layer, so that a file in which one tensor is missing is not
// taken for another version but gets an error that names the tensor.
absl::StatusOr<ModelVersion> FindVersion(const Checkpoint& checkpoint) {
  if (checkpoint.tensors().empty()) return absl::InvalidArgumentError("holds no tensor");
  if (OnlyTunedStates(checkpoint)) {
    return absl::InvalidArgumentError(
        "holds tuned states (att.time_state) without the model they belong to; workers of that model take it by "
        "--initial_states NAME=FILE");
  }
  const int layers = CountLayers(checkpoint);
  if (layers == 0) {
    std::vector<std::string> names;
    for (const TensorInfo& info : checkpoint.tensors().subspan(0, 3)) names.push_back(Quoted(info.name));
    return absl::InvalidArgumentError(absl::StrCat(
        "is no RWKV model with the original names: it has no blocks.N.*, but ", absl::StrJoin(names, ", "), " ..."));
  }
  const auto any = [&](absl::string_view part) { return AnyNameHas(checkpoint, part); };

  if (any(".lora_A") || any(".lora_B") || any(".disha") || any(".bone")) {
    return absl::UnimplementedError(
        "holds an adapter (LoRA or the like) without the model it belongs to; workers merge it by --lora, and so does "
        "rwkvctl convert");
  }
  if (any(".att.r_k") || any(".att.x_r") || any(".att.k_k") || any(".att.a0")) {
    if (any(".ffn.enn.") || any(".ennk") || any(".emm")) return Recognised("the RWKV-8 experiment (ffn.enn)");
    if (any(".qkv.")) return ModelVersion::k7b;
    return any(".ffn.s_emb") ? ModelVersion::k7a : ModelVersion::k7;
  }
  if (any(".att.time_maa_rkvw_w1") || any(".att.gate_w1")) return Recognised("RWKV-6 (an x060a/b/c experiment)");
  if (any(".att.time_maa_")) {
    if (any(".ffn.aa.") || any(".ffn.bb.")) return Recognised("RWKV-6 with MishGLU (an experiment)");
    return ModelVersion::k6;
  }
  if (any(".att.ln_x.")) {
    if (HasChannelDecay(checkpoint)) return ModelVersion::k5_2;
    return any(".att.gate.") || any(".att.time_mix_g") ? ModelVersion::k5_1 : ModelVersion::k5_0;
  }
  if (any(".att.time_mix_k") || any(".att.time_mix_v") || any("ffnPre.")) {
    if (any("head_q.") || any("head_k.")) return Recognised("RWKV-3 or 4 with a head that copies (head_q)");
    if (any("ffnPre.")) return Recognised("RWKV-3 or 4 with a channel mix in place of the first time mix (ffnPre)");
    if (HasColumnDecay(checkpoint)) return Recognised("RWKV-3");
    return ModelVersion::k4;
  }
  if (any(".att.time_mix")) return Recognised("RWKV-2");
  if (any(".attn.time_w") || any(".attn.time_alpha")) return Recognised("RWKV-1");
  if (any(".rosa")) return Recognised("RWKV-8 (ROSA)");
  return absl::InvalidArgumentError(
      absl::StrCat("is no RWKV model that is known: it has ", layers, " blocks, but none of the names of any version"));
}

// Checks tensors against their specs, and keeps book of what was asked for.
class Inventory {
 public:
  explicit Inventory(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  // `prefix` is "blocks.N." or empty. Sizes that are not known yet become known.
  absl::Status Check(const ModelTensor& spec, absl::string_view prefix, Sizes* sizes) {
    const std::string name = absl::StrCat(prefix, spec.name);
    if (spec.kind == Kind::kNorm) {
      const std::string weight = absl::StrCat(name, ".weight"), bias = absl::StrCat(name, ".bias");
      if (spec.presence == Presence::kOptional && !Has(weight) && !Has(bias)) return absl::OkStatus();
      RWKV_RETURN_IF_ERROR(CheckVector(spec, weight, sizes));
      return CheckVector(spec, bias, sizes);
    }
    if (spec.presence == Presence::kOptional && !Has(name)) return absl::OkStatus();
    switch (spec.kind) {
      case Kind::kMatrix:
        return CheckMatrix(spec, name, sizes);
      case Kind::kLowRank:
      case Kind::kLowRankStack:
        return CheckLowRank(spec, name, sizes);
      default:
        return CheckVector(spec, name, sizes);
    }
  }

  bool Has(absl::string_view name) const { return checkpoint_.Find(name) != nullptr; }

  // Counts as known, whatever it is.
  void Ignore(absl::string_view name) {
    if (const TensorInfo* info = checkpoint_.Find(name)) known_.insert(info);
  }

  // The names of all others, which must be a trainer's own unless anything goes.
  absl::StatusOr<std::vector<std::string>> CheckNothingElse(ModelVersion version, bool ignore_extra_tensors) const {
    std::vector<std::string> ignored;
    for (const TensorInfo& info : checkpoint_.tensors()) {
      if (known_.contains(&info)) continue;
      if (!ignore_extra_tensors && !IsLeftByTrainers(info.name)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "tensor ", Quoted(info.name), " of shape ", ShapeString(info.shape), " is not part of an RWKV-",
            Name(version), " that this build knows (--ignore_extra_tensors leaves such tensors out)"));
      }
      ignored.push_back(info.name);
    }
    return ignored;
  }

  int64_t parameters() const { return parameters_; }
  absl::string_view MostFrequentType() const {
    const auto largest = std::max_element(elements_of_.begin(), elements_of_.end(),
                                          [](const auto& a, const auto& b) { return a.second < b.second; });
    return largest == elements_of_.end() ? "" : largest->first;
  }

 private:
  absl::StatusOr<const TensorInfo*> Need(absl::string_view name) const {
    const TensorInfo* info = checkpoint_.Find(name);
    if (info == nullptr) return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " is missing"));
    return info;
  }

  absl::StatusOr<const TensorInfo*> NeedFloats(absl::string_view name) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, Need(name));
    if (!WeightDType(info->type).has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " is ", ElementTypeName(info->type),
                                                     "; weights are fp32, bf16 or fp16"));
    }
    Count(info, info->bytes / ElementSize(info->type), ElementTypeName(info->type));
    return info;
  }

  void Count(const TensorInfo* info, int64_t elements, absl::string_view type) {
    if (!known_.insert(info).second) return;
    parameters_ += elements;
    elements_of_[type] += elements;
  }

  static absl::Status WrongShape(const TensorInfo& info, const ModelTensor& spec, const Sizes& sizes) {
    std::vector<std::string> expected;
    for (int i = 0; i < spec.rank(); ++i) {
      const int64_t size = sizes[spec.shape[i]];
      expected.push_back(size != 0 ? absl::StrCat(size) : std::string(Name(spec.shape[i])));
    }
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(info.name), " has shape ", ShapeString(info.shape),
                                                   ", but its place in the model wants [",
                                                   absl::StrJoin(expected, ", "), "]"));
  }

  // Whether `shape` is the spec's; what it tells of the sizes is kept.
  static absl::Status Match(const TensorInfo& info, const ModelTensor& spec, absl::Span<const int64_t> shape,
                            Sizes* sizes) {
    const Sizes before = *sizes;
    bool fits = static_cast<int>(shape.size()) == spec.rank();
    for (int i = 0; fits && i < spec.rank(); ++i) fits = sizes->Set(spec.shape[i], shape[i]);
    return fits ? absl::OkStatus() : WrongShape(info, spec, before);
  }

  // Dimensions of one may be anywhere.
  absl::Status CheckVector(const ModelTensor& spec, const std::string& name, Sizes* sizes) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, NeedFloats(name));
    std::vector<int64_t> shape = info->shape;
    for (size_t i = shape.size(); i-- > 0 && static_cast<int>(shape.size()) > spec.rank();) {
      if (shape[i] == 1) shape.erase(shape.begin() + i);
    }
    return Match(*info, spec, shape, sizes);
  }

  absl::Status CheckLowRank(const ModelTensor& spec, const std::string& name, Sizes* sizes) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, NeedFloats(name));
    if (spec.kind == Kind::kLowRank && info->shape.size() == 2 && info->shape[0] != info->shape[1] &&
        info->shape[1] == (*sizes)[spec.shape[0]]) {
      return absl::UnimplementedError(absl::StrCat("tensor ", Quoted(name), " has shape ", ShapeString(info->shape),
                                                   ", transposed as in web-rwkv's dialect, which the rest of the "
                                                   "file does not follow; the original layout is [in, out]"));
    }
    return Match(*info, spec, info->shape, sizes);
  }

  // As it is, or NAME int8 [out, in] with NAME.scale fp16 [out, groups], or NAME uint8 [out, ceil(in / 2)] (two to a
  // byte) with NAME.scale and NAME.min.
  absl::Status CheckMatrix(const ModelTensor& spec, const std::string& name, Sizes* sizes) {
    const std::string scale = absl::StrCat(name, ".scale"), minimum = absl::StrCat(name, ".min");
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, Need(name));
    const bool is_int8 = info->type == ElementType::kInt8, is_int4 = info->type == ElementType::kUint8;
    if (!is_int8 && !is_int4) {
      RWKV_RETURN_IF_ERROR(NeedFloats(name).status());
      return Match(*info, spec, info->shape, sizes);
    }
    std::vector<int64_t> shape = info->shape;
    const int64_t cols = (*sizes)[spec.shape[1]];
    if (is_int4) {
      if (shape.size() != 2 || shape[1] != (cols + 1) / 2) return WrongShape(*info, spec, *sizes);
      shape[1] = cols;
    }
    RWKV_RETURN_IF_ERROR(Match(*info, spec, shape, sizes));
    Count(info, shape[0] * shape[1], is_int8 ? "int8" : "int4");
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* first, Need(scale));
    const int64_t groups = first->shape.empty() ? 0 : first->shape.back();
    RWKV_RETURN_IF_ERROR(CheckGroups(scale, shape[0], shape[1], groups));
    return is_int4 ? CheckGroups(minimum, shape[0], shape[1], groups) : absl::OkStatus();
  }

  absl::Status CheckGroups(const std::string& name, int64_t rows, int64_t cols, int64_t groups) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, Need(name));
    known_.insert(info);
    if (info->type != ElementType::kFloat16 || info->shape != std::vector<int64_t>{rows, groups} ||
        QuantizationGroup(cols, groups) == 0) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " is ", ElementTypeName(info->type), " ",
                                                     ShapeString(info->shape), ", but ", rows, " rows of ", cols,
                                                     " quantized weights need fp16 for groups of 32 or 64"));
    }
    return absl::OkStatus();
  }

  const Checkpoint& checkpoint_;
  absl::flat_hash_set<const TensorInfo*> known_;
  int64_t parameters_ = 0;
  std::map<absl::string_view, int64_t> elements_of_;  // By the name of their type.
};

absl::Status CheckLayer(ModelVersion version, int layer, Inventory* inventory, Sizes* sizes) {
  const std::string prefix = absl::StrCat("blocks.", layer, ".");
  const absl::Span<const ModelTensor> specs = LayerTensors(version);
  absl::optional<Role> done;  // By the first of two alternatives.
  for (size_t i = 0; i < specs.size(); ++i) {
    const ModelTensor& spec = specs[i];
    if (done == spec.role) continue;
    if (spec.presence == Presence::kNotInLayer0 && layer == 0) {
      inventory->Ignore(absl::StrCat(prefix, spec.name));
      continue;
    }
    const bool has_alternative = i + 1 < specs.size() && specs[i + 1].role == spec.role;
    if (has_alternative && !inventory->Has(absl::StrCat(prefix, spec.name))) continue;
    RWKV_RETURN_IF_ERROR(inventory->Check(spec, prefix, sizes));
    done = spec.role;
  }
  return absl::OkStatus();
}

// A layer number far above the others would otherwise be answered by thousands of missing tensors' worth of work.
absl::Status CheckNumbering(const Checkpoint& checkpoint, int layer_count) {
  absl::flat_hash_set<int> layers;
  for (const TensorInfo& info : checkpoint.tensors()) {
    if (const absl::optional<int> layer = LayerOfName(info.name)) layers.insert(*layer);
  }
  for (int layer = 0; static_cast<int>(layers.size()) < layer_count && layer < layer_count; ++layer) {
    if (!layers.contains(layer)) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " is missing: there is no tensor blocks.", layer,
                                                     ".*, but there are some of blocks.", layer_count - 1));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> Build(const Checkpoint& checkpoint, bool ignore_extra_tensors) {
  ModelConfig config;
  RWKV_ASSIGN_OR_RETURN(config.version, FindVersion(checkpoint));
  config.layer_count = CountLayers(checkpoint);
  RWKV_RETURN_IF_ERROR(CheckNumbering(checkpoint, config.layer_count));

  Inventory inventory(checkpoint);
  Sizes sizes;
  for (const ModelTensor& spec : ModelTensors()) RWKV_RETURN_IF_ERROR(inventory.Check(spec, "", &sizes));
  for (int layer = 0; layer < config.layer_count; ++layer) {
    sizes.ClearRanks();
    RWKV_RETURN_IF_ERROR(CheckLayer(config.version, layer, &inventory, &sizes));
    config.layer_sizes.push_back(sizes);
    config.has_initial_state |= inventory.Has(absl::StrCat("blocks.", layer, ".att.time_state"));
  }
  if (inventory.Has("head.bias")) return Recognised("head.bias");
  RWKV_ASSIGN_OR_RETURN(config.ignored, inventory.CheckNothingElse(config.version, ignore_extra_tensors));
  config.width = sizes[Size::kWidth];
  config.attention_width = sizes[Size::kAttentionWidth];
  config.head_count = sizes[Size::kHeads];
  config.head_size = sizes[Size::kHeadSize];
  config.ffn_width = sizes[Size::kFfnWidth];
  config.vocab_size = sizes[Size::kVocabulary];
  config.embedding_is_normalised = !inventory.Has("blocks.0.ln0.weight");
  config.dtype = std::string(inventory.MostFrequentType());
  config.parameters = inventory.parameters();
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::FromCheckpoint(const Checkpoint& checkpoint, bool ignore_extra_tensors) {
  absl::StatusOr<ModelConfig> config = Build(checkpoint, ignore_extra_tensors);
  if (config.ok()) return config;
  return absl::Status(config.status().code(), absl::StrCat(checkpoint.path(), ": ", config.status().message()));
}

std::vector<std::string> Notes(const Checkpoint& checkpoint, const ModelConfig& config) {
  constexpr size_t kNamed = 8;
  std::vector<std::string> notes(checkpoint.notes().begin(), checkpoint.notes().end());
  const std::vector<std::string>& ignored = config.ignored;
  if (ignored.empty()) return notes;
  std::vector<std::string> names;
  for (size_t i = 0; i < ignored.size() && i < kNamed; ++i) names.push_back(Quoted(ignored[i]));
  notes.push_back(absl::StrCat(ignored.size(), " tensors are no part of the model and are left out: ",
                               absl::StrJoin(names, ", "), ignored.size() > kNamed ? ", ..." : ""));
  return notes;
}

}  // namespace rwkv::checkpoint
