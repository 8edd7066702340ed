#include "tests/testing/random_model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"

namespace rwkv::testing {
namespace {

using checkpoint::ElementType;

struct PlannedTensor {
  TensorSpec spec;
  bool is_normal = true;  // Else uniform in [mean - spread, mean + spread).
  double mean = 0;
  double spread = 1;  // Standard deviation if normal.
};

ElementType TypeOf(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kFloat32:
      return ElementType::kFloat32;
    case kernels::DType::kBFloat16:
      return ElementType::kBFloat16;
    case kernels::DType::kFloat16:
      return ElementType::kFloat16;
  }
  return ElementType::kFloat32;
}

using checkpoint::Kind;
using checkpoint::ModelTensor;
using checkpoint::ModelVersion;
using checkpoint::Presence;
using checkpoint::Role;
using checkpoint::Size;

using Plan = std::vector<PlannedTensor>;

PlannedTensor Normal(double spread, double mean = 0) { return {{}, true, mean, spread}; }
PlannedTensor Uniform(double low, double high) { return {{}, false, (low + high) / 2, (high - low) / 2}; }

// The scale of a tensor's elements, which have `inputs` products in a sum if it is a matrix.
PlannedTensor ScaleOf(ModelVersion version, const ModelTensor& spec, int64_t inputs) {
  const double in_scale = 1 / std::sqrt(static_cast<double>(inputs));
  const bool is_7 = version >= ModelVersion::k7;
  switch (spec.role) {
    case Role::kEmbedding:
      return Normal(0.5);
    case Role::kHead:
      return Normal(2 * in_scale);
    case Role::kOutput:
      return Normal(0.7 * in_scale);
    case Role::kFfnValue:
      return Normal(0.5 * in_scale);
    case Role::kDecay:
      if (version == ModelVersion::k4) return Uniform(-5, 3);
      return is_7 ? Uniform(-7, 1) : version == ModelVersion::k6 ? Uniform(-6, 1) : Uniform(-6, 0);
    case Role::kBonus:
      if (is_7) return Normal(0.2);
      return version == ModelVersion::k4     ? Normal(0.5, -1.2)
             : version == ModelVersion::k5_0 ? Normal(0.5, -1)
                                             : Normal(0.5);
    case Role::kIclr:
      return Normal(0.5);
    case Role::kValueResidual:
      return Normal(0.3, 0.7);
    case Role::kKeyScale:
      return Normal(0.1, 0.85);
    case Role::kKeyIclrScale:
      return Normal(0.2, 1);
    case Role::kInitialState:
      return Normal(0.3);
    case Role::kDeepEmbedBias:
      return Normal(0.2, 1);
    case Role::kDeepEmbedTable:
      return Normal(0.1);
    case Role::kKeyTable:
    case Role::kValueTable:
      return Normal(0.3, 1);
    case Role::kDeepEmbedMap:
    case Role::kKeyMap:
    case Role::kValueMap:
      return Normal(0.1 * in_scale);
    case Role::kShiftUp:
    case Role::kDeepEmbedUp:
      return Normal(0.1);
    case Role::kDecayUp:
      return Normal(is_7 ? 0.3 : 0.1);
    default:
      break;
  }
  switch (spec.kind) {
    case Kind::kMatrix:
      return Normal(in_scale);
    case Kind::kLowRank:  // A second factor's inputs are the rank.
      return checkpoint::IsRank(spec.shape[0]) ? Normal(0.3) : Normal(in_scale);
    default:
      return Uniform(0, 1);  // The mixes of a token shift.
  }
}

// A vector of the model's width is [1, 1, D] in files of all versions, other vectors from RWKV-6 on too.
std::vector<int64_t> FileShape(ModelVersion version, const ModelTensor& spec, const checkpoint::Sizes& sizes) {
  std::vector<int64_t> shape;
  for (int i = 0; i < spec.rank(); ++i) shape.push_back(sizes[spec.shape[i]]);
  const bool is_flat = spec.shape[0] == Size::kAttentionWidth && version == ModelVersion::k4;
  if (spec.kind == Kind::kVector && shape.size() == 1 && !is_flat) shape.insert(shape.begin(), 2, 1);
  return shape;
}

void AddTensor(const RandomModelOptions& options, const ModelTensor& spec, const std::string& prefix,
               const checkpoint::Sizes& sizes, Plan* plan) {
  const std::string name = absl::StrCat(prefix, spec.name);
  const ElementType type = TypeOf(options.dtype);
  if (spec.kind == Kind::kNorm) {
    const int64_t width = sizes[spec.shape[0]];
    plan->push_back({{absl::StrCat(name, ".weight"), type, {width}}, true, 1, 0.1});
    // A one in each input of ffn.key, for the shift.
    const double bias = options.key_shift != 0 && spec.role == Role::kLn2 ? 1 : 0;
    plan->push_back({{absl::StrCat(name, ".bias"), type, {width}}, true, bias, 0.1});
    return;
  }
  const std::vector<int64_t> shape = FileShape(options.version, spec, sizes);
  PlannedTensor planned = ScaleOf(options.version, spec, spec.kind == Kind::kMatrix ? shape[1] : shape[0]);
  planned.spec = {name, type, shape};
  if (spec.role == Role::kFfnKey) planned.mean -= options.key_shift / static_cast<double>(shape[1]);
  plan->push_back(std::move(planned));
}

absl::StatusOr<checkpoint::Sizes> SizesOf(const RandomModelOptions& options) {
  const int64_t D = options.width;
  const bool has_heads = options.version != ModelVersion::k4;
  const std::pair<Size, int64_t> kGiven[] = {
      {Size::kWidth, D},
      {Size::kHeadSize, options.head_size},
      {Size::kFfnWidth, options.ffn_width != 0 ? options.ffn_width : 4 * D},
      {Size::kVocabulary, options.vocab_size},
      {Size::kMixRank, options.mix_rank},
      {Size::kDecayRank, options.decay_rank},
      {Size::kIclrRank, options.iclr_rank},
      {Size::kValueResidualRank, options.value_residual_rank},
      {Size::kGateRank, options.gate_rank},
      {Size::kDeepEmbedWidth, options.deep_embed_width},
      {Size::kQueryWidth, options.query_width},
      {Size::kCacheWidth, options.cache_width},
  };
  constexpr int64_t kLargest = 1 << 24;  // Keeps every product below 2^63.
  checkpoint::Sizes sizes;
  for (const auto& [size, value] : kGiven) {
    if (size == Size::kHeadSize && !has_heads) continue;
    if (value > kLargest || !sizes.Set(size, value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("random model: a ", checkpoint::Name(size), " of ", value, " is not in [1, ", kLargest, "]"));
    }
  }
  const int64_t A = options.attention_width != 0 ? options.attention_width : D;
  if (has_heads && A % options.head_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("random model: attention width ", A, " is not a multiple of the head size ", options.head_size));
  }
  if (A > kLargest || !sizes.Set(Size::kAttentionWidth, A) ||
      (has_heads && !sizes.Set(Size::kHeads, A / options.head_size))) {
    return absl::InvalidArgumentError(absl::StrCat("random model: no attention width of ", A));
  }
  if (options.layers < 1 || options.layers > kLargest) {
    return absl::InvalidArgumentError(absl::StrCat("random model: ", options.layers, " layers"));
  }
  return sizes;
}

absl::StatusOr<Plan> MakePlan(const RandomModelOptions& options) {
  RWKV_ASSIGN_OR_RETURN(const checkpoint::Sizes sizes, SizesOf(options));
  Plan plan;
  for (const ModelTensor& spec : checkpoint::ModelTensors()) {
    if (spec.role != Role::kLn0 || options.ln0) AddTensor(options, spec, "", sizes, &plan);
  }
  for (int layer = 0; layer < options.layers; ++layer) {
    absl::optional<Role> before;
    for (const ModelTensor& spec : checkpoint::LayerTensors(options.version)) {
      if (spec.presence == Presence::kNotInLayer0 && layer == 0 && !options.layer0_value_residual) continue;
      if (spec.role == Role::kInitialState && !options.time_state) continue;
      // Of two alternatives RWKV-5.0 has the first, 5.1 the second.
      const bool is_second = before == spec.role;
      if (is_second && options.version == ModelVersion::k5_0) continue;
      if (is_second) plan.pop_back();
      before = spec.role;
      AddTensor(options, spec, absl::StrCat("blocks.", layer, "."), sizes, &plan);
    }
  }
  return plan;
}

// Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (SplitMix64's finalizer).
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t HashName(absl::string_view name) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325;
  for (char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  return hash;
}

// In [-1, 1), of unit variance times 1/3 if uniform; near enough to normal as the sum of four 16-bit draws: no libm, so
// no bit differs between machines.
double Draw(uint64_t key, int64_t index, bool is_normal) {
  const uint64_t bits = Mix(key + 0x9e3779b97f4a7c15 * (static_cast<uint64_t>(index) + 1));
  if (!is_normal) return static_cast<double>(bits >> 11) * 0x1p-52 - 1;
  const int64_t sum =
      static_cast<int64_t>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
  // Four uniforms on [0, 1) have variance 1/3.
  return (static_cast<double>(sum) * 0x1p-16 - 2) * 1.7320508075688772;
}

absl::Status Generate(const PlannedTensor& tensor, const RandomModelOptions& options,
                      absl::FunctionRef<absl::Status(absl::string_view)> append) {
  constexpr int64_t kChunk = 1 << 16;
  const uint64_t key = Mix(options.seed ^ Mix(HashName(tensor.spec.name)));
  const int64_t elements = ElementsOf(tensor.spec);
  std::vector<float> values(std::min(elements, kChunk));
  std::string bytes;
  for (int64_t start = 0; start < elements; start += kChunk) {
    const int64_t count = std::min(kChunk, elements - start);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(tensor.mean + tensor.spread * Draw(key, start + i, tensor.is_normal));
    }
    bytes.resize(count * kernels::SizeOf(options.dtype));
    kernels::NarrowFromFloat(options.dtype, values.data(), count, &bytes[0]);
    RWKV_RETURN_IF_ERROR(append(bytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<RawTensor>> MakeRandomModel(const RandomModelOptions& options) {
  RWKV_ASSIGN_OR_RETURN(const Plan plan, MakePlan(options));
  std::vector<RawTensor> tensors;
  for (const PlannedTensor& planned : plan) {
    RawTensor tensor{planned.spec, ""};
    RWKV_RETURN_IF_ERROR(Generate(planned, options, [&tensor](absl::string_view bytes) {
      tensor.data.append(bytes.data(), bytes.size());
      return absl::OkStatus();
    }));
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

absl::Status WriteRandomModel(const RandomModelOptions& options, const std::string& path) {
  RWKV_ASSIGN_OR_RETURN(const Plan plan, MakePlan(options));
  std::vector<TensorSpec> specs;
  for (const PlannedTensor& planned : plan) specs.push_back(planned.spec);
  return WriteFileAtomically(path, [&](const AppendFunction& append) -> absl::Status {
    RWKV_RETURN_IF_ERROR(append(SafetensorsHeader(
        specs,
        {{"format", "pt"},
         {"origin", absl::StrCat("random RWKV-", checkpoint::Name(options.version), ", seed ", options.seed)}})));
    for (const PlannedTensor& planned : plan) RWKV_RETURN_IF_ERROR(Generate(planned, options, append));
    return absl::OkStatus();
  });
}

}  // namespace rwkv::testing
