#include "services/checkpoint/model_config.h"

#include <algorithm>
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

absl::Status Recognised(absl::string_view what) {
  return absl::UnimplementedError(absl::StrCat(what, " is recognised, but this build serves RWKV-7 only"));
}

// Ok for an RWKV-7. shared/spec: the names tell the version; they are looked for in any layer, so that a file in which
// one tensor is missing is not taken for another version but gets an error that names the tensor.
absl::Status CheckVersion(const Checkpoint& checkpoint) {
  if (checkpoint.tensors().empty()) return absl::InvalidArgumentError("holds no tensor");
  if (OnlyTunedStates(checkpoint)) {
    return absl::InvalidArgumentError(
        "holds tuned states (att.time_state) without the model they belong to; merge them into its file");
  }
  const int layers = CountLayers(checkpoint);
  if (layers == 0) {
    std::vector<std::string> names;
    for (const TensorInfo& info : checkpoint.tensors().subspan(0, 3)) names.push_back(Quoted(info.name));
    return absl::InvalidArgumentError(absl::StrCat(
        "is no RWKV model with the original names: it has no blocks.N.*, but ", absl::StrJoin(names, ", "), " ..."));
  }
  const auto any = [&](absl::string_view part) { return AnyNameHas(checkpoint, part); };

  if (any(".att.r_k") || any(".att.x_r") || any(".att.k_k") || any(".att.a0")) {
    if (any(".ffn.enn.") || any(".ennk") || any(".emm")) return Recognised("the RWKV-8 experiment (ffn.enn)");
    if (any(".qkv.")) return Recognised("RWKV-7b (DeepEmbed with attention)");
    if (any(".s_emb")) return Recognised("RWKV-7a (DeepEmbed)");
    if (any(".lora_A") || any(".lora_B") || any(".disha") || any(".bone")) {
      return absl::UnimplementedError("holds trainer's adapters (LoRA or the like); merge them into the model first");
    }
    return absl::OkStatus();
  }
  if (any(".att.time_maa_rkvw_w1") || any(".att.gate_w1")) return Recognised("RWKV-6 (an x060a/b/c experiment)");
  if (any(".att.time_maa_")) return Recognised("RWKV-6 (x060)");
  if (any(".att.ln_x.")) {
    const TensorInfo* decay = checkpoint.Find(absl::StrCat("blocks.", layers - 1, ".att.time_decay"));
    if (decay != nullptr && decay->shape.size() == 2 && decay->shape[1] > 1) return Recognised("RWKV-5.2");
    return Recognised(any(".att.gate.") ? "RWKV-5.1" : "RWKV-5.0");
  }
  if (any(".att.time_mix_v") || any("ffnPre.")) return Recognised(any(".ln0.") ? "RWKV-4" : "RWKV-3 or older");
  if (any(".att.time_mix")) return Recognised("RWKV-2");
  if (any(".rosa")) return Recognised("RWKV-8 (ROSA)");
  return absl::InvalidArgumentError(
      absl::StrCat("is no RWKV model that is known: it has ", layers, " blocks, but none of the names of any version"));
}

// Finds expected tensors, checks them, and keeps book of what was asked for.
class Inventory {
 public:
  explicit Inventory(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  bool Has(absl::string_view name) const { return checkpoint_.Find(name) != nullptr; }

  absl::StatusOr<const TensorInfo*> Need(absl::string_view name) {
    const TensorInfo* info = checkpoint_.Find(name);
    if (info == nullptr) return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " is missing"));
    const absl::optional<kernels::DType> dtype = WeightDType(info->type);
    if (!dtype.has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " is ", ElementTypeName(info->type),
                                                     "; weights are fp32, bf16 or fp16"));
    }
    if (known_.insert(info).second) {
      const int64_t elements = info->bytes / ElementSize(info->type);
      parameters_ += elements;
      elements_of_[static_cast<int>(*dtype)] += elements;
    }
    return info;
  }

  // `shape` as it is.
  absl::Status NeedShape(absl::string_view name, absl::Span<const int64_t> shape) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, Need(name));
    return absl::MakeConstSpan(info->shape) == shape ? absl::OkStatus() : WrongShape(*info, ShapeString(shape));
  }

  // [size], [1, size] or [1, 1, size].
  absl::Status NeedVector(absl::string_view name, int64_t size) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, Need(name));
    const bool fits = !info->shape.empty() && info->shape.back() == size &&
                      std::all_of(info->shape.begin(), info->shape.end() - 1, [](int64_t n) { return n == 1; });
    return fits ? absl::OkStatus() : WrongShape(*info, absl::StrCat("[", size, "], or that behind dimensions of 1"));
  }

  // Any matrix of at least one row and column.
  absl::StatusOr<const TensorInfo*> NeedMatrix(absl::string_view name) {
    RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, Need(name));
    if (info->shape.size() != 2 || info->bytes == 0) return WrongShape(*info, "that of a matrix");
    return info;
  }

  // Counts as known, whatever it is.
  void Ignore(absl::string_view name) {
    if (const TensorInfo* info = checkpoint_.Find(name)) known_.insert(info);
  }

  absl::Status CheckNothingElse() const {
    for (const TensorInfo& info : checkpoint_.tensors()) {
      if (!known_.contains(&info)) {
        return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(info.name), " of shape ",
                                                       ShapeString(info.shape),
                                                       " is not part of an RWKV-7 that this build knows"));
      }
    }
    return absl::OkStatus();
  }

  static absl::Status WrongShape(const TensorInfo& info, absl::string_view expected) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(info.name), " has shape ", ShapeString(info.shape),
                                                   ", but its place in the model wants ", expected));
  }

  int64_t parameters() const { return parameters_; }
  kernels::DType MostFrequentDType() const {
    return static_cast<kernels::DType>(std::max_element(std::begin(elements_of_), std::end(elements_of_)) -
                                       std::begin(elements_of_));
  }

 private:
  const Checkpoint& checkpoint_;
  absl::flat_hash_set<const TensorInfo*> known_;
  int64_t parameters_ = 0;
  int64_t elements_of_[3] = {0, 0, 0};  // By kernels::DType.
};

// Sizes that one tensor each decides; all others are then held to them.
absl::Status ReadSizes(Inventory* inventory, ModelConfig* config) {
  RWKV_ASSIGN_OR_RETURN(const TensorInfo* embedding, inventory->NeedMatrix("emb.weight"));
  RWKV_ASSIGN_OR_RETURN(const TensorInfo* bonus, inventory->NeedMatrix("blocks.0.att.r_k"));
  RWKV_ASSIGN_OR_RETURN(const TensorInfo* ffn_key, inventory->NeedMatrix("blocks.0.ffn.key.weight"));
  config->vocab_size = embedding->shape[0];
  config->width = embedding->shape[1];
  config->head_count = bonus->shape[0];
  config->head_size = bonus->shape[1];
  config->attention_width = config->head_count * config->head_size;  // Elements of a tensor in the file: no overflow.
  config->ffn_width = ffn_key->shape[0];
  // They cross the wire as int32.
  constexpr int64_t kLargest = 1 << 30;
  for (int64_t size : {config->vocab_size, config->width, config->attention_width, config->ffn_width}) {
    if (size > kLargest) return absl::InvalidArgumentError(absl::StrCat("a width of ", size, " is beyond any model"));
  }
  return absl::OkStatus();
}

// The pair PREFIX1 [D, rank], PREFIX2 [rank, A].
absl::Status CheckLowRank(Inventory* inventory, const std::string& prefix, const ModelConfig& config, int64_t* rank) {
  const std::string down = absl::StrCat(prefix, "1");
  RWKV_ASSIGN_OR_RETURN(const TensorInfo* info, inventory->NeedMatrix(down));
  if (info->shape[0] != config.width) {
    if (info->shape[1] == config.width) {
      return absl::UnimplementedError(
          absl::StrCat("tensor ", Quoted(down), " has shape ", ShapeString(info->shape),
                       ", transposed: this is web-rwkv's dialect; this build reads the original layout [D, rank]"));
    }
    return Inventory::WrongShape(*info, absl::StrCat("[", config.width, ", rank]"));
  }
  *rank = info->shape[1];
  return inventory->NeedShape(absl::StrCat(prefix, "2"), {*rank, config.attention_width});
}

absl::Status CheckLayer(Inventory* inventory, int layer, ModelConfig* config) {
  const int64_t D = config->width;
  const int64_t A = config->attention_width;
  const int64_t F = config->ffn_width;
  const std::string block = absl::StrCat("blocks.", layer, ".");
  const std::string att = absl::StrCat(block, "att.");
  const std::string ffn = absl::StrCat(block, "ffn.");

  for (const char* norm : {"ln1", "ln2"}) {
    RWKV_RETURN_IF_ERROR(inventory->NeedVector(absl::StrCat(block, norm, ".weight"), D));
    RWKV_RETURN_IF_ERROR(inventory->NeedVector(absl::StrCat(block, norm, ".bias"), D));
  }
  for (const char* name : {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g"}) {
    RWKV_RETURN_IF_ERROR(inventory->NeedVector(absl::StrCat(att, name), D));
  }
  for (const char* name : {"w0", "a0", "k_k", "k_a", "ln_x.weight", "ln_x.bias"}) {
    RWKV_RETURN_IF_ERROR(inventory->NeedVector(absl::StrCat(att, name), A));
  }
  RWKV_RETURN_IF_ERROR(inventory->NeedShape(absl::StrCat(att, "r_k"), {config->head_count, config->head_size}));

  ModelConfig::Ranks& ranks = config->ranks[layer];
  RWKV_RETURN_IF_ERROR(CheckLowRank(inventory, absl::StrCat(att, "w"), *config, &ranks.decay));
  RWKV_RETURN_IF_ERROR(CheckLowRank(inventory, absl::StrCat(att, "a"), *config, &ranks.iclr));
  RWKV_RETURN_IF_ERROR(CheckLowRank(inventory, absl::StrCat(att, "g"), *config, &ranks.gate));
  if (layer == 0) {
    // Layer 0 makes v_first and mixes nothing into it; some files carry dummies here.
    for (const char* name : {"v0", "v1", "v2"}) inventory->Ignore(absl::StrCat(att, name));
  } else {
    RWKV_RETURN_IF_ERROR(inventory->NeedVector(absl::StrCat(att, "v0"), A));
    RWKV_RETURN_IF_ERROR(CheckLowRank(inventory, absl::StrCat(att, "v"), *config, &ranks.value_residual));
  }

  for (const char* name : {"receptance.weight", "key.weight", "value.weight"}) {
    RWKV_RETURN_IF_ERROR(inventory->NeedShape(absl::StrCat(att, name), {A, D}));
  }
  RWKV_RETURN_IF_ERROR(inventory->NeedShape(absl::StrCat(att, "output.weight"), {D, A}));
  RWKV_RETURN_IF_ERROR(inventory->NeedVector(absl::StrCat(ffn, "x_k"), D));
  RWKV_RETURN_IF_ERROR(inventory->NeedShape(absl::StrCat(ffn, "key.weight"), {F, D}));
  RWKV_RETURN_IF_ERROR(inventory->NeedShape(absl::StrCat(ffn, "value.weight"), {D, F}));

  const std::string state = absl::StrCat(att, "time_state");
  config->has_initial_state[layer] = inventory->Has(state);
  if (config->has_initial_state[layer]) {
    RWKV_RETURN_IF_ERROR(inventory->NeedShape(state, {config->head_count, config->head_size, config->head_size}));
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

absl::StatusOr<ModelConfig> Build(const Checkpoint& checkpoint) {
  RWKV_RETURN_IF_ERROR(CheckVersion(checkpoint));
  ModelConfig config;
  config.layer_count = CountLayers(checkpoint);
  RWKV_RETURN_IF_ERROR(CheckNumbering(checkpoint, config.layer_count));
  config.ranks.resize(config.layer_count);
  config.has_initial_state.resize(config.layer_count);

  Inventory inventory(checkpoint);
  RWKV_RETURN_IF_ERROR(ReadSizes(&inventory, &config));
  for (int layer = 0; layer < config.layer_count; ++layer) {
    RWKV_RETURN_IF_ERROR(CheckLayer(&inventory, layer, &config));
  }
  config.embedding_is_normalised = !inventory.Has("blocks.0.ln0.weight") && !inventory.Has("blocks.0.ln0.bias");
  if (!config.embedding_is_normalised) {
    RWKV_RETURN_IF_ERROR(inventory.NeedVector("blocks.0.ln0.weight", config.width));
    RWKV_RETURN_IF_ERROR(inventory.NeedVector("blocks.0.ln0.bias", config.width));
  }
  RWKV_RETURN_IF_ERROR(inventory.NeedVector("ln_out.weight", config.width));
  RWKV_RETURN_IF_ERROR(inventory.NeedVector("ln_out.bias", config.width));
  RWKV_RETURN_IF_ERROR(inventory.NeedShape("head.weight", {config.vocab_size, config.width}));
  if (inventory.Has("head.bias")) return absl::UnimplementedError("head.bias is recognised, but not supported");
  RWKV_RETURN_IF_ERROR(inventory.CheckNothingElse());
  config.dtype = inventory.MostFrequentDType();
  config.parameters = inventory.parameters();
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::FromCheckpoint(const Checkpoint& checkpoint) {
  absl::StatusOr<ModelConfig> config = Build(checkpoint);
  if (config.ok()) return config;
  return absl::Status(config.status().code(), absl::StrCat(checkpoint.path(), ": ", config.status().message()));
}

}  // namespace rwkv::checkpoint
