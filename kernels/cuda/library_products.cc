#include "kernels/cuda/library_products.h"

#include <algorithm>
#include <iterator>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/device_weight.h"

namespace rwkv::kernels::cuda {
namespace {

using cublaslt::CublasLt;
using cublaslt::Property;

constexpr uint32_t kOperandAlignment = 16;  // bytes, of each matrix and of its rows
constexpr int64_t kSumsOfRow = 4;           // Rows of sums begin at multiples of so many.
constexpr int64_t kMostSumBytes = int64_t{256} << 20;
constexpr int kCandidates = 8;  // Asked for; the first is the fastest by the library's guess.

// Widths of published models: for the family's name.
constexpr int64_t kWidths[] = {768, 1024, 2048, 2560, 4096};

int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// FNV-1a.
uint64_t HashWith(uint64_t hash, uint64_t word) {
  for (int byte = 0; byte < 8; ++byte) hash = (hash ^ (word >> (8 * byte) & 0xffu)) * 1099511628211u;
  return hash;
}

// The algorithm's properties. kUnimplemented: it splits sums.
absl::Status Describe(const CublasLt& library, const cublaslt::Algorithm& algorithm,
                      std::array<uint32_t, cublaslt::kProperties>& properties) {
  for (int i = 0; i < cublaslt::kProperties; ++i) {
    const auto property = static_cast<Property>(i);
    size_t written = 0;
    properties[i] = 0;
    RWKV_RETURN_IF_ERROR(ToStatus(
        library, library.algo_config_get_attribute(&algorithm, i, &properties[i], cublaslt::SizeOf(property), &written),
        absl::StrCat("cublasLtMatmulAlgoConfigGetAttribute ", i)));
  }
  const uint32_t splits = properties[static_cast<int>(Property::kSplits)];
  const uint32_t scheme = properties[static_cast<int>(Property::kReductionScheme)];
  if (splits <= 1 && scheme == cublaslt::kNoReductionScheme) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("an algorithm that splits sums into ", splits));
}

}  // namespace

std::string LibraryProducts::Shape::ToStringWithoutRows() const {
  return absl::StrFormat("%d outputs of %d inputs (%s)", outputs, inputs, Name(dtype));
}

std::string LibraryProducts::Shape::ToString() const {
  return absl::StrCat(ToStringWithoutRows(), ", ", rows, " rows");
}

std::string LibraryProducts::ToString(const Plan& plan) {
  const auto property = [&](Property is) { return plan.configuration[static_cast<int>(is)]; };
  return absl::StrCat("algorithm ", property(Property::kId), ", tile ", property(Property::kTile), ", stages ",
                      property(Property::kStages));
}

LibraryProducts::Plan::~Plan() {
  for (cublaslt::MatrixLayout* const layout : {weights, inputs, sums}) {
    if (layout != nullptr) library.matrix_layout_destroy(layout);
  }
}

absl::StatusOr<std::unique_ptr<LibraryProducts>> LibraryProducts::Create(const CublasLt& library,
                                                                         absl::string_view name, int64_t least_rows) {
  std::unique_ptr<LibraryProducts> products(new LibraryProducts(library, name, least_rows));
  RWKV_RETURN_IF_ERROR(products->Describe());
  RWKV_RETURN_IF_ERROR(products->NameFamily());
  return products;
}

LibraryProducts::LibraryProducts(const CublasLt& library, absl::string_view name, int64_t least_rows)
    : library_(library), name_(name), buckets_(LibraryBuckets(least_rows)) {}

LibraryProducts::~LibraryProducts() {
  if (preference_ != nullptr) library_.preference_destroy(preference_);
  if (desc_ != nullptr) library_.matmul_desc_destroy(desc_);
  if (context_ != nullptr) library_.destroy(context_);
}

absl::Status LibraryProducts::Check(absl::string_view what, cublaslt::Result result) const {
  if (result == cublaslt::kSuccess) return absl::OkStatus();
  return ToStatus(library_, result, absl::StrCat(name_, ": ", what));
}

// Columns of the library are our rows: sums^T [outputs, rows] = weights [outputs, inputs] inputs^T [inputs, rows].
absl::Status LibraryProducts::Describe() {
  RWKV_RETURN_IF_ERROR(Check("cublasLtCreate", library_.create(&context_)));
  RWKV_RETURN_IF_ERROR(Check("cublasLtMatmulDescCreate",
                             library_.matmul_desc_create(&desc_, cublaslt::kComputeFloat32, cublaslt::kFloat32)));
  RWKV_RETURN_IF_ERROR(Check("cublasLtMatmulDescSetAttribute",
                             library_.matmul_desc_set_attribute(desc_, cublaslt::kDescTransA, &cublaslt::kTransposed,
                                                                sizeof(cublaslt::kTransposed))));
  RWKV_RETURN_IF_ERROR(Check("cublasLtMatmulPreferenceCreate", library_.preference_create(&preference_)));
  const auto prefer = [&](int attribute, auto value) {
    return Check(absl::StrCat("cublasLtMatmulPreferenceSetAttribute ", attribute),
                 library_.preference_set_attribute(preference_, attribute, &value, sizeof(value)));
  };
  RWKV_RETURN_IF_ERROR(prefer(cublaslt::kPreferenceMaxWorkspaceBytes, static_cast<uint64_t>(kLibraryWorkspaceBytes)));
  RWKV_RETURN_IF_ERROR(prefer(cublaslt::kPreferenceReductionSchemes, cublaslt::kNoReductionScheme));
  for (int operand = 0; operand < 4; ++operand) {
    RWKV_RETURN_IF_ERROR(prefer(cublaslt::kPreferenceMinAlignmentABytes + operand, kOperandAlignment));
  }
  return absl::OkStatus();
}

absl::Status LibraryProducts::NameFamily() {
  uint64_t hash = 14695981039346656037u;
  for (const int64_t rows : buckets_) {
    hash = HashWith(hash, static_cast<uint64_t>(rows));
    for (const int64_t width : kWidths) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        for (const auto& [outputs, inputs] : {std::pair(width, width), {4 * width, width}, {width, 4 * width}}) {
          RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Plan> plan, MakePlan({dtype, outputs, inputs, rows}));
          for (const uint32_t property : plan->configuration) hash = HashWith(hash, property);
        }
      }
    }
  }
  family_ = absl::StrFormat("lt-%d-%016x", library_.get_version(), hash);
  return absl::OkStatus();
}

LibraryProducts::Shape LibraryProducts::ShapeOf(const MatrixView& matrix, int64_t rows) {
  return {matrix.dtype, matrix.rows, PitchOf(matrix) / SizeOf(matrix.dtype), rows};
}

bool LibraryProducts::Takes(const MatrixView& matrix, int64_t rows) const {
  return rows >= buckets_.front() && matrix.quantization == Quantization::kNone && matrix.dtype != DType::kFloat32;
}

int64_t LibraryProducts::BucketOf(int64_t rows) const {
  return *std::lower_bound(buckets_.begin(), std::prev(buckets_.end()), rows);
}

int64_t LibraryProducts::MostRows(int64_t outputs) const {
  const int64_t most = kMostSumBytes / (RoundUp(outputs, kSumsOfRow) * static_cast<int64_t>(sizeof(float)));
  const auto behind = std::upper_bound(buckets_.begin(), buckets_.end(), most);
  return behind == buckets_.begin() ? buckets_.front() : *std::prev(behind);
}

absl::StatusOr<std::unique_ptr<LibraryProducts::Plan>> LibraryProducts::MakePlan(const Shape& shape) const {
  auto plan = std::make_unique<Plan>(library_);
  const int type = shape.dtype == DType::kFloat16 ? cublaslt::kFloat16 : cublaslt::kBFloat16;
  const auto lay = [&](cublaslt::MatrixLayout** layout, int of, int64_t rows, int64_t cols, int64_t ld) {
    return Check("cublasLtMatrixLayoutCreate", library_.matrix_layout_create(layout, of, static_cast<uint64_t>(rows),
                                                                             static_cast<uint64_t>(cols), ld));
  };
  RWKV_RETURN_IF_ERROR(lay(&plan->weights, type, shape.inputs, shape.outputs, shape.inputs));
  RWKV_RETURN_IF_ERROR(lay(&plan->inputs, type, shape.inputs, shape.rows, shape.inputs));
  RWKV_RETURN_IF_ERROR(
      lay(&plan->sums, cublaslt::kFloat32, shape.outputs, shape.rows, RoundUp(shape.outputs, kSumsOfRow)));
  cublaslt::HeuristicResult candidates[kCandidates] = {};
  int count = 0;
  RWKV_RETURN_IF_ERROR(Check(absl::StrCat("cublasLtMatmulAlgoGetHeuristic for ", shape.ToString()),
                             library_.algo_get_heuristic(context_, desc_, plan->weights, plan->inputs, plan->sums,
                                                         plan->sums, preference_, kCandidates, candidates, &count)));
  absl::Status why = absl::UnimplementedError("there is none");  // Of the last one.
  for (int i = 0; i < count; ++i) {
    why = Check("the candidate", candidates[i].state);
    if (!why.ok()) continue;
    cublaslt::HeuristicResult checked = {};
    const cublaslt::Algorithm& algorithm = candidates[i].algorithm;
    const cublaslt::Result result =
        library_.algo_check(context_, desc_, plan->weights, plan->inputs, plan->sums, plan->sums, &algorithm, &checked);
    why = Check("cublasLtMatmulAlgoCheck", result);
    if (why.ok() && checked.workspace_bytes > static_cast<size_t>(kLibraryWorkspaceBytes)) {
      why = absl::UnimplementedError(absl::StrCat("a workspace of ", checked.workspace_bytes, " bytes"));
    }
    if (why.ok()) why = cuda::Describe(library_, algorithm, plan->configuration);
    if (!why.ok()) continue;
    plan->algorithm = algorithm;
    return plan;
  }
  return absl::UnimplementedError(absl::StrCat("cuBLASLt: ", name_, ": none of ", count, " candidates will do for ",
                                               shape.ToString(), ": ", why.message()));
}

absl::Status LibraryProducts::Choose(const MatrixView& matrix) {
  if (!Takes(matrix, kMostLibraryRows)) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  for (const int64_t rows : buckets_) {
    const Shape shape = ShapeOf(matrix, rows);
    if (rows > MostRows(shape.outputs) || plans_.contains(shape)) continue;
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<const Plan> plan, MakePlan(shape));
    plans_.emplace(shape, std::move(plan));
  }
  return absl::OkStatus();
}

std::vector<std::string> LibraryProducts::Choices(const MatrixView& matrix) const {
  std::vector<std::string> choices;
  absl::ReaderMutexLock lock(&mu_);
  for (const int64_t rows : buckets_) {
    const auto it = plans_.find(ShapeOf(matrix, rows));
    if (it == plans_.end()) continue;
    choices.push_back(absl::StrCat(it->first.ToString(), ": ", ToString(*it->second)));
  }
  return choices;
}

std::vector<std::string> LibraryProducts::AllChoices() const {
  std::map<std::string, std::map<int64_t, std::string>> by_shape;
  absl::ReaderMutexLock lock(&mu_);
  for (const auto& [shape, plan] : plans_) by_shape[shape.ToStringWithoutRows()][shape.rows] = ToString(*plan);
  std::vector<std::string> lines;
  for (const auto& [shape, by_rows] : by_shape) {
    lines.push_back(absl::StrCat(shape, ": ", absl::StrJoin(by_rows, "; ", absl::PairFormatter(" rows: "))));
  }
  return lines;
}

absl::Status LibraryProducts::Enqueue(const Product& product, int64_t rows, CudaStream& stream) const {
  const MatrixView& matrix = product.weight->matrix;
  const int64_t most = MostRows(matrix.rows);
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t count = std::min(most, rows - begin);
    Product part = product;
    part.x += begin * matrix.cols;
    part.y += begin * matrix.rows;
    if (part.gate != nullptr) part.gate += begin * matrix.rows;
    const Shape shape = ShapeOf(matrix, BucketOf(count));
    const Plan* plan = nullptr;
    {
      absl::ReaderMutexLock lock(&mu_);
      const auto it = plans_.find(shape);
      if (it != plans_.end()) plan = it->second.get();
    }
    if (plan == nullptr) {
      return absl::InternalError(absl::StrCat(name_, ": no algorithm was chosen for ", shape.ToString()));
    }
    Shape of_part = shape;
    of_part.rows = count;
    RWKV_RETURN_IF_ERROR(Multiply(part, *plan, of_part, stream));
  }
  return absl::OkStatus();
}

// Sums go where they are wanted, if rows and outputs fill what the library writes and nothing that is needed lies
// there; else into scratch memory, from where the epilogue takes them.
absl::Status LibraryProducts::Multiply(const Product& product, const Plan& plan, const Shape& shape,
                                       CudaStream& stream) const {
  const int64_t bucket = BucketOf(shape.rows);
  const int64_t pitch = RoundUp(shape.outputs, kSumsOfRow);
  const bool has_epilogue =
      product.bias != nullptr || product.gate != nullptr || product.activation != Activation::kNone;
  const bool fits =
      bucket == shape.rows && pitch == shape.outputs && reinterpret_cast<uintptr_t>(product.y) % kOperandAlignment == 0;
  const bool is_direct = fits && (!has_epilogue || (!product.accumulate && product.gate != product.y));

  const int64_t input_bytes = RoundUp(bucket * shape.inputs * SizeOf(shape.dtype), kBufferAlignment);
  const int64_t sum_bytes = is_direct ? 0 : bucket * pitch * static_cast<int64_t>(sizeof(float));
  RWKV_ASSIGN_OR_RETURN(void* const scratch, stream.Scratch(kLibraryWorkspaceBytes + input_bytes + sum_bytes));
  char* const workspace = static_cast<char*>(scratch);
  auto* const inputs = reinterpret_cast<uint16_t*>(workspace + kLibraryWorkspaceBytes);
  auto* const sums = is_direct ? product.y : reinterpret_cast<float*>(workspace + kLibraryWorkspaceBytes + input_bytes);

  RoundInputsArgs round;
  round.x = product.x;
  round.rows = shape.rows;
  round.inputs = product.weight->matrix.cols;
  round.dtype = shape.dtype;
  round.to = inputs;
  round.to_rows = bucket;
  round.pitch = shape.inputs;
  RWKV_RETURN_IF_ERROR(stream.Run("round inputs", &KernelSet::round_inputs, round));

  const float one = 1.0f;
  const float old = is_direct && product.accumulate ? 1.0f : 0.0f;
  const cublaslt::Result result =
      library_.matmul(context_, desc_, &one, product.weight->matrix.data, plan.weights, inputs, plan.inputs, &old, sums,
                      plan.sums, sums, plan.sums, &plan.algorithm, workspace,
                      static_cast<size_t>(kLibraryWorkspaceBytes), static_cast<StreamHandle>(stream.handle()));
  if (result != cublaslt::kSuccess) {
    absl::Status status = Check(absl::StrCat("cublasLtMatmul of ", shape.ToString()), result);
    // It was checked when it was chosen, so that it would fail again. Memory may be there the next time.
    return result == cublaslt::kAllocFailed ? status : stream.Break(std::move(status));
  }
  if (is_direct && !has_epilogue) return absl::OkStatus();
  FinishProductArgs finish;
  finish.product = &product;
  finish.rows = shape.rows;
  finish.sums = sums;
  finish.pitch = pitch;
  return stream.Run("finish a product", &KernelSet::finish_product, finish);
}

}  // namespace rwkv::kernels::cuda
