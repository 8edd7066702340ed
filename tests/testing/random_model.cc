#include "tests/testing/random_model.h"

#include <algorithm>
#include <cmath>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
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

class Plan {
 public:
  explicit Plan(ElementType type) : type_(type) {}

  void Normal(const std::string& name, std::vector<int64_t> shape, double spread, double mean = 0) {
    tensors_.push_back({{name, type_, std::move(shape)}, true, mean, spread});
  }
  void Uniform(const std::string& name, std::vector<int64_t> shape, double low, double high) {
    tensors_.push_back({{name, type_, std::move(shape)}, false, (low + high) / 2, (high - low) / 2});
  }
  void Norm(const std::string& name, int64_t width) {
    Normal(absl::StrCat(name, ".weight"), {width}, 0.1, 1);
    Normal(absl::StrCat(name, ".bias"), {width}, 0.1);
  }
  void Linear(const std::string& name, int64_t out, int64_t in, double gain = 1) {
    Normal(absl::StrCat(name, ".weight"), {out, in}, gain / std::sqrt(static_cast<double>(in)));
  }

  const std::vector<PlannedTensor>& tensors() const { return tensors_; }

 private:
  const ElementType type_;
  std::vector<PlannedTensor> tensors_;
};

absl::StatusOr<Plan> MakePlan(const RandomModelOptions& options) {
  const int64_t D = options.width;
  const int64_t N = options.head_size;
  const int64_t V = options.vocab_size;
  const int64_t A = options.attention_width != 0 ? options.attention_width : D;
  const int64_t F = options.ffn_width != 0 ? options.ffn_width : 4 * D;
  constexpr int64_t kLargest = 1 << 24;  // Keeps every product below 2^63.
  for (int64_t size : {int64_t{options.layers}, D, N, V, A, F, options.decay_rank, options.iclr_rank,
                       options.value_residual_rank, options.gate_rank}) {
    if (size < 1 || size > kLargest) {
      return absl::InvalidArgumentError(
          absl::StrCat("random model: a size of ", size, " is not in [1, ", kLargest, "]"));
    }
  }
  if (A % N != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("random model: attention width ", A, " is not a multiple of the head size ", N));
  }
  const double in_scale = 1 / std::sqrt(static_cast<double>(D));

  Plan plan(TypeOf(options.dtype));
  plan.Normal("emb.weight", {V, D}, 0.5);
  for (int layer = 0; layer < options.layers; ++layer) {
    const std::string block = absl::StrCat("blocks.", layer, ".");
    const std::string att = block + "att.";
    const std::string ffn = block + "ffn.";
    const auto low_rank = [&](const std::string& name, int64_t rank) {
      plan.Normal(name + "1", {D, rank}, in_scale);
      plan.Normal(name + "2", {rank, A}, 0.3);
    };
    if (layer == 0 && options.ln0) plan.Norm(block + "ln0", D);
    plan.Norm(block + "ln1", D);
    plan.Norm(block + "ln2", D);
    for (const char* name : {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g"}) plan.Uniform(att + name, {1, 1, D}, 0, 1);
    plan.Uniform(att + "w0", {1, 1, A}, -7, 1);
    low_rank(att + "w", options.decay_rank);
    plan.Normal(att + "a0", {1, 1, A}, 0.5);
    low_rank(att + "a", options.iclr_rank);
    if (layer > 0 || options.layer0_value_residual) {
      plan.Normal(att + "v0", {1, 1, A}, 0.3, 0.7);
      low_rank(att + "v", options.value_residual_rank);
    }
    low_rank(att + "g", options.gate_rank);
    plan.Normal(att + "k_k", {1, 1, A}, 0.1, 0.85);
    plan.Normal(att + "k_a", {1, 1, A}, 0.2, 1);
    plan.Normal(att + "r_k", {A / N, N}, 0.2);
    plan.Linear(att + "receptance", A, D);
    plan.Linear(att + "key", A, D);
    plan.Linear(att + "value", A, D);
    plan.Linear(att + "output", D, A, 0.7);
    plan.Norm(att + "ln_x", A);
    plan.Uniform(ffn + "x_k", {1, 1, D}, 0, 1);
    plan.Linear(ffn + "key", F, D);
    plan.Linear(ffn + "value", D, F, 0.5);
    if (options.time_state) plan.Normal(att + "time_state", {A / N, N, N}, 0.3);
  }
  plan.Norm("ln_out", D);
  plan.Linear("head", V, D, 2);
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
  for (const PlannedTensor& planned : plan.tensors()) {
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
  for (const PlannedTensor& planned : plan.tensors()) specs.push_back(planned.spec);
  return WriteFileAtomically(path, [&](const AppendFunction& append) -> absl::Status {
    RWKV_RETURN_IF_ERROR(append(
        SafetensorsHeader(specs, {{"format", "pt"}, {"origin", absl::StrCat("random RWKV-7, seed ", options.seed)}})));
    for (const PlannedTensor& planned : plan.tensors()) RWKV_RETURN_IF_ERROR(Generate(planned, options, append));
    return absl::OkStatus();
  });
}

}  // namespace rwkv::testing
