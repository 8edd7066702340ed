#include "kernels/cuda/testing/fake_cublaslt.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "kernels/cuda/testing/fake_cublaslt_state.h"
#include "kernels/cuda/testing/fake_runtime.h"

namespace rwkv::kernels::cuda::cublaslt {
namespace fake {

Fake& TheFake() {
  static auto* const fake = new Fake;
  return *fake;
}

Result Violate(std::string what, Result result) {
  TellFake(absl::StrCat("cuBLASLt: ", what));
  return result;
}

bool IsLive(const void* handle, const char* what) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  const auto it = fake.live.find(handle);
  return it != fake.live.end() && std::strcmp(it->second, what) == 0;
}

// Whether they fit together, and are what it computes: [outputs, rows] = [inputs, outputs]^T [inputs, rows].
Result CheckOperands(const char* what, const Context* context, const MatmulDesc* desc, const Operands& of) {
  if (!IsLive(context, kContext)) return Violate(absl::StrCat(what, " with what is no context"));
  if (!IsLive(desc, kDesc)) return Violate(absl::StrCat(what, " with what is no description of a product"));
  for (const MatrixLayout* layout : {of.a, of.b, of.c, of.d}) {
    if (!IsLive(layout, kLayout)) return Violate(absl::StrCat(what, " with what is no layout"));
    if (layout->ld * BytesOf(layout->type) % kVectorBytes != 0) {
      return Violate(absl::StrCat(what, " with columns every ", layout->ld, " numbers, not of 16 bytes"),
                     kNotSupported);
    }
  }
  const bool is_known = desc->compute_type == kComputeFloat32 && desc->scale_type == kFloat32 &&
                        desc->trans_a == kTransposed && of.a->type == of.b->type &&
                        (of.a->type == kFloat16 || of.a->type == kBFloat16) && of.c->type == kFloat32 &&
                        of.d->type == kFloat32;
  if (!is_known) return Violate(absl::StrCat(what, " of types or an order that it has not"), kNotSupported);
  const bool fit = of.a->rows == of.b->rows && of.a->cols == of.d->rows && of.b->cols == of.d->cols &&
                   of.c->rows == of.d->rows && of.c->cols == of.d->cols;
  return fit ? kSuccess : Violate(absl::StrCat(what, " of shapes that do not fit"));
}

// Whether it is one of this device and these shapes.
Result CheckAlgorithm(const char* what, const Context& context, const Operands& of, const Algorithm* algorithm) {
  if (algorithm == nullptr || algorithm->data[kOf] != kMagic) return Violate(absl::StrCat(what, " of no algorithm"));
  const auto is = [&](Word word, int64_t value) { return static_cast<int64_t>(algorithm->data[word]) == value; };
  if (algorithm->data[kDevice] >> 32 != static_cast<uint64_t>(context.major)) {
    return Violate(absl::StrCat(what, " of an algorithm that the device does not have"), kArchMismatch);
  }
  const bool is_type = algorithm->data[kDevice] == DeviceWord(context.major, of.a->type);
  if (!is(kRows, of.d->rows) || !is(kCols, of.d->cols) || !is(kInputs, of.a->rows) || !is_type) {
    return Violate(absl::StrCat(what, " of an algorithm for another shape"));
  }
  return kSuccess;
}

}  // namespace fake

using namespace fake;  // NOLINT: its other half.
namespace {

template <typename T>
void Add(T** handle, T made, const char* what) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  *handle = new T(made);
  fake.live[*handle] = what;
}

template <typename T>
Result Remove(T* handle, const char* what) {
  if (!IsLive(handle, what)) return Violate(absl::StrCat("the end of what is no ", what));
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.live.erase(handle);
  delete handle;
  return kSuccess;
}

size_t GetVersion() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return static_cast<size_t>(fake.faults.version);
}

size_t GetCudartVersion() { return CUDART_VERSION; }

const char* GetStatusName(Result result) {
  switch (result) {
    case kSuccess:
      return "CUBLAS_STATUS_SUCCESS";
    case kNotInitialized:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kAllocFailed:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case kInvalidValue:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case kArchMismatch:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case kMappingError:
      return "CUBLAS_STATUS_MAPPING_ERROR";
    case kExecutionFailed:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case kNotSupported:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
  }
}

Result Create(Context** context) {
  ForbidInStepOfFake("cuBLASLt: a context is made");
  *context = nullptr;
  Fake& fake = TheFake();
  {
    absl::MutexLock lock(&fake.mu);
    if (fake.faults.no_driver) return kNotInitialized;
  }
  cudaDeviceProp properties;
  if (kFakeRuntime.get_device_properties(&properties, 0) != cudaSuccess) return kNotInitialized;
  Context made;
  made.major = properties.major;
  Add(context, made, kContext);
  return kSuccess;
}

Result Destroy(Context* context) { return Remove(context, kContext); }

Result MatmulDescCreate(MatmulDesc** desc, int compute_type, int scale_type) {
  MatmulDesc made;
  made.compute_type = compute_type;
  made.scale_type = scale_type;
  Add(desc, made, kDesc);
  return kSuccess;
}

Result MatmulDescDestroy(MatmulDesc* desc) { return Remove(desc, kDesc); }

template <typename T>
Result Set(T& to, const void* value, size_t bytes, int attribute) {
  if (value == nullptr || bytes != sizeof(T)) {
    return Violate(absl::StrCat("attribute ", attribute, " of ", bytes, " bytes, not ", sizeof(T)));
  }
  std::memcpy(&to, value, bytes);
  return kSuccess;
}

Result MatmulDescSetAttribute(MatmulDesc* desc, int attribute, const void* value, size_t bytes) {
  if (!IsLive(desc, kDesc)) return Violate("an attribute of what is no description of a product");
  if (attribute == kDescTransA) return Set(desc->trans_a, value, bytes, attribute);
  return Violate(absl::StrCat("attribute ", attribute, " of a product"));
}

Result MatrixLayoutCreate(MatrixLayout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (rows == 0 || cols == 0 || ld < static_cast<int64_t>(rows)) {
    return Violate(absl::StrCat("a layout of ", rows, " x ", cols, " every ", ld));
  }
  Add(layout, {type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld}, kLayout);
  return kSuccess;
}

Result MatrixLayoutDestroy(MatrixLayout* layout) { return Remove(layout, kLayout); }

Result PreferenceCreate(Preference** preference) {
  Add(preference, {}, kPreference);
  return kSuccess;
}

Result PreferenceDestroy(Preference* preference) { return Remove(preference, kPreference); }

Result PreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
  if (!IsLive(preference, kPreference)) return Violate("an attribute of what is no preference");
  if (attribute == kPreferenceMaxWorkspaceBytes) return Set(preference->workspace_bytes, value, bytes, attribute);
  if (attribute == kPreferenceReductionSchemes) return Set(preference->reduction_schemes, value, bytes, attribute);
  const int operand = attribute - kPreferenceMinAlignmentABytes;
  if (operand >= 0 && operand < 4) {
    uint32_t alignment = 0;
    if (const Result wrong = Set(alignment, value, bytes, attribute); wrong != kSuccess) return wrong;
    if (alignment < kVectorBytes || alignment > kMostAlignment || (alignment & (alignment - 1)) != 0) {
      return Violate(absl::StrCat("an alignment to ", alignment, " bytes"), kNotSupported);
    }
    preference->alignments[operand] = alignment;
    return kSuccess;
  }
  return Violate(absl::StrCat("preference ", attribute));
}

Algorithm AlgorithmFor(const Context& context, const Operands& of, const Preference& preference, int64_t number,
                       int64_t splits) {
  Algorithm algorithm = {};
  const int64_t words[8] = {kMagic, 0, of.d->rows, of.d->cols, of.a->rows, 0, number, splits};
  for (int i = 0; i < 8; ++i) algorithm.data[i] = static_cast<uint64_t>(words[i]);
  algorithm.data[kDevice] = DeviceWord(context.major, of.a->type);
  for (int operand = 0; operand < 4; ++operand) {
    algorithm.data[kAlignments] |= uint64_t{preference.alignments[operand]} << (16 * operand);
  }
  return algorithm;
}

// First one that means nothing, then one of sums that are split if it may, then one that does not pass the check, and
// two that do.
Result AlgoGetHeuristic(Context* context, MatmulDesc* desc, MatrixLayout* a, MatrixLayout* b, MatrixLayout* c,
                        MatrixLayout* d, Preference* preference, int wanted, HeuristicResult* results, int* count) {
  ForbidInStepOfFake("cuBLASLt: an algorithm is looked for");
  const Operands of = {a, b, c, d};
  if (const Result result = CheckOperands("a search", context, desc, of); result != kSuccess) return result;
  if (!IsLive(preference, kPreference) || wanted <= 0) return Violate("a search without preferences or results");
  *count = 0;
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  ++fake.counts.searches;
  if (fake.faults.no_algorithm) return kNotSupported;
  if (static_cast<uint64_t>(fake.faults.workspace_bytes) > preference->workspace_bytes) return kNotSupported;
  std::vector<HeuristicResult> found;
  const int64_t number = d->cols / 2 + a->rows / 16 + 2 * (d->rows / 32) + fake.faults.other_choice;
  const auto add = [&](Result state, int64_t which, int64_t splits) {
    HeuristicResult result;
    std::memset(&result, 0xff, sizeof(result));
    result.state = state;
    if (state == kSuccess) {
      result.algorithm = AlgorithmFor(*context, of, *preference, which, splits);
      result.workspace_bytes = static_cast<size_t>(fake.faults.workspace_bytes);
    }
    found.push_back(result);
  };
  add(kNotSupported, 0, 1);
  if (preference->reduction_schemes != 0 || fake.faults.offers_splits) add(kSuccess, number, 4);
  add(kSuccess, number, 0);  // No algorithm has no split: it does not pass.
  add(kSuccess, number, 1);
  add(kSuccess, number + 1, 1);
  for (; *count < std::min(wanted, static_cast<int>(found.size())); ++*count) results[*count] = found[*count];
  return kSuccess;
}

Result AlgoCheck(Context* context, MatmulDesc* desc, MatrixLayout* a, MatrixLayout* b, MatrixLayout* c, MatrixLayout* d,
                 const Algorithm* algorithm, HeuristicResult* result) {
  const Operands of = {a, b, c, d};
  if (const Result wrong = CheckOperands("a check", context, desc, of); wrong != kSuccess) return wrong;
  if (const Result wrong = CheckAlgorithm("a check", *context, of, algorithm); wrong != kSuccess) return wrong;
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  std::memset(result, 0xff, sizeof(*result));  // Its algorithm is never written.
  if (fake.faults.checks_fail || algorithm->data[kSplits] == 0) return kNotSupported;
  result->state = kSuccess;
  result->workspace_bytes = static_cast<size_t>(fake.faults.workspace_bytes);
  return kSuccess;
}

Result AlgoConfigGetAttribute(const Algorithm* algorithm, int property, void* value, size_t bytes, size_t* written) {
  if (algorithm->data[kOf] != kMagic) return Violate("a property of no algorithm");
  if (property < 0 || property >= kProperties || bytes != SizeOf(static_cast<Property>(property))) {
    return Violate(absl::StrCat("property ", property, " of ", bytes, " bytes"));
  }
  uint32_t is = 0;
  if (property == static_cast<int>(Property::kId)) is = static_cast<uint32_t>(algorithm->data[kNumber]);
  if (property == static_cast<int>(Property::kTile)) is = static_cast<uint32_t>(Chains(*algorithm));
  if (property == static_cast<int>(Property::kSplits)) is = static_cast<uint32_t>(algorithm->data[kSplits]);
  if (property == static_cast<int>(Property::kReductionScheme)) is = algorithm->data[kSplits] > 1 ? 2 : 0;
  std::memcpy(value, &is, bytes);
  *written = bytes;
  return kSuccess;
}

}  // namespace

const CublasLt kFakeCublasLt = {GetVersion,
                                GetCudartVersion,
                                GetStatusName,
                                Create,
                                Destroy,
                                MatmulDescCreate,
                                MatmulDescDestroy,
                                MatmulDescSetAttribute,
                                MatrixLayoutCreate,
                                MatrixLayoutDestroy,
                                PreferenceCreate,
                                PreferenceDestroy,
                                PreferenceSetAttribute,
                                AlgoGetHeuristic,
                                AlgoCheck,
                                AlgoConfigGetAttribute,
                                Matmul};

absl::StatusOr<FakeFaults> ParseFakeFaults(absl::string_view text) {
  FakeFaults faults;
  for (absl::string_view part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> fault = absl::StrSplit(part, absl::MaxSplits('=', 1));
    const auto& [name, value] = fault;
    const bool ok = name == "version"        ? absl::SimpleAtoi(value, &faults.version)
                    : name == "no_driver"    ? absl::SimpleAtob(value, &faults.no_driver)
                    : name == "no_algorithm" ? absl::SimpleAtob(value, &faults.no_algorithm)
                    : name == "checks_fail"  ? absl::SimpleAtob(value, &faults.checks_fail)
                    : name == "other_choice" ? absl::SimpleAtoi(value, &faults.other_choice)
                    : name == "no_memory_at" ? absl::SimpleAtoi(value, &faults.no_memory_at)
                    : name == "fail_at"      ? absl::SimpleAtoi(value, &faults.fail_at)
                    : name == "fail_with"    ? absl::SimpleAtoi(value, &faults.fail_with)
                                             : false;
    if (!ok) return absl::InvalidArgumentError(absl::StrCat("\"", part, "\" is no fault of the fake cuBLASLt"));
  }
  return faults;
}

void ResetFake(const FakeFaults& faults) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.faults = faults;
  fake.counts = {};
}

FakeCounts CountsOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  FakeCounts counts = fake.counts;
  for (const auto& [handle, what] : fake.live) {
    std::strcmp(what, kContext) == 0 ? ++counts.contexts : ++counts.descriptions;
  }
  return counts;
}

}  // namespace rwkv::kernels::cuda::cublaslt
