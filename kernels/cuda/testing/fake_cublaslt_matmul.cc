// The fake's product: what it wants of memory, and the kernel.
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/fake_cublaslt_state.h"
#include "kernels/cuda/testing/fake_runtime.h"

namespace rwkv::kernels::cuda::cublaslt::fake {
namespace {

// A kernel of the fake.
struct Multiplication {
  const uint16_t* a;
  const uint16_t* b;
  const float* c;
  float* d;
  char* workspace;
  int64_t workspace_bytes;
  int64_t outputs, rows, inputs;
  int64_t a_ld, b_ld, c_ld, d_ld;
  int64_t slow_us;
  float alpha, beta;
  int32_t chains, splits;
  int32_t is_half;
};

constexpr int kThreads = 32;

void MultiplyKernel(Multiplication m) {
  emulation::BeginKernel();
  const int thread = emulation::ThreadIndex();
  if (thread == 0) {
    std::memset(m.workspace, 0xff, static_cast<size_t>(m.workspace_bytes));
    if (m.slow_us > 0) absl::SleepFor(absl::Microseconds(m.slow_us));
  }
  const auto widen = [&](uint16_t bits) { return m.is_half != 0 ? HalfToFloat(bits) : BFloat16ToFloat(bits); };
  for (int64_t i = thread; i < m.outputs * m.rows; i += kThreads) {
    const int64_t row = i / m.outputs;
    const int64_t output = i % m.outputs;
    const uint16_t* const x = m.b + row * m.b_ld;
    const uint16_t* const w = m.a + output * m.a_ld;
    const int64_t first = m.splits > 1 ? row % m.inputs : 0;  // Split sums meet in any order.
    float sum = 0.0f;
    for (int chain = 0; chain < m.chains; ++chain) {
      float part = 0.0f;
      for (int64_t at = chain; at < m.inputs; at += m.chains) {
        const int64_t k = (at + first) % m.inputs;
        part += widen(x[k]) * widen(w[k]);
      }
      sum += part;
    }
    const float old = m.beta == 0.0f ? 0.0f : m.beta * m.c[output + row * m.c_ld];
    m.d[output + row * m.d_ld] = m.alpha * sum + old;
  }
}

// Its first byte, how many it has, what it is called.
struct Memory {
  const void* data;
  int64_t bytes;
  const char* name;
  uint32_t alignment;
};

int64_t SizeOf(const MatrixLayout& layout) {
  return ((layout.cols - 1) * layout.ld + layout.rows) * BytesOf(layout.type);
}

bool Overlap(const Memory& one, const Memory& other) {
  const char* const a = static_cast<const char*>(one.data);
  const char* const b = static_cast<const char*>(other.data);
  return a < b + other.bytes && b < a + one.bytes;
}

Result CheckMemory(const Memory& a, const Memory& b, const Memory& c, const Memory& d, const Memory& workspace) {
  for (const Memory& memory : {a, b, d, c, workspace}) {
    if (!IsDeviceMemoryOfFake(memory.data, memory.bytes)) {
      return Violate(
          absl::StrCat("a matmul with ", memory.name, " of ", memory.bytes, " bytes that are not the device's"));
    }
    if (reinterpret_cast<uintptr_t>(memory.data) % memory.alignment != 0) {
      return Violate(absl::StrCat("a matmul with ", memory.name, " that is not aligned to ", memory.alignment));
    }
  }
  for (const Memory& memory : {a, b, workspace}) {
    if (Overlap(memory, d)) return Violate(absl::StrCat("a matmul that writes to its ", memory.name));
  }
  for (const Memory& memory : {a, b, c}) {
    if (Overlap(memory, workspace)) return Violate(absl::StrCat("a matmul whose workspace is its ", memory.name));
  }
  return kSuccess;
}

}  // namespace

Result Matmul(Context* context, MatmulDesc* desc, const void* alpha, const void* a, MatrixLayout* a_layout,
              const void* b, MatrixLayout* b_layout, const void* beta, const void* c, MatrixLayout* c_layout, void* d,
              MatrixLayout* d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
              StreamHandle stream) {
  const Operands of = {a_layout, b_layout, c_layout, d_layout};
  if (const Result wrong = CheckOperands("a matmul", context, desc, of); wrong != kSuccess) return wrong;
  if (const Result wrong = CheckAlgorithm("a matmul", *context, of, algorithm); wrong != kSuccess) return wrong;
  if (algorithm->data[kSplits] == 0) return Violate("a matmul of an algorithm that does not pass the check");
  if (c == d && c_layout->ld != d_layout->ld) return Violate("a matmul in place of two layouts");
  FakeFaults faults;
  int64_t number = 0;
  {
    Fake& fake = TheFake();
    absl::MutexLock lock(&fake.mu);
    faults = fake.faults;
    number = fake.counts.matmuls++;
  }
  if (static_cast<int64_t>(workspace_bytes) < faults.workspace_bytes) {
    return Violate(
        absl::StrCat("a matmul with a workspace of ", workspace_bytes, " bytes, not ", faults.workspace_bytes));
  }
  const Result wrong =
      CheckMemory({a, SizeOf(*a_layout), "weights", AlignmentOf(*algorithm, 0)},
                  {b, SizeOf(*b_layout), "inputs", AlignmentOf(*algorithm, 1)},
                  {c, SizeOf(*c_layout), "addends", AlignmentOf(*algorithm, 2)},
                  {d, SizeOf(*d_layout), "sums", AlignmentOf(*algorithm, 3)},
                  {workspace, static_cast<int64_t>(workspace_bytes), "workspace", kWorkspaceAlignment});
  if (wrong != kSuccess) return wrong;
  if (number == faults.no_memory_at) return kAllocFailed;
  if (faults.fail_at >= 0 && number >= faults.fail_at) return static_cast<Result>(faults.fail_with);
  Multiplication m = {};
  m.a = static_cast<const uint16_t*>(a);
  m.b = static_cast<const uint16_t*>(b);
  m.c = static_cast<const float*>(c);
  m.d = static_cast<float*>(d);
  m.workspace = static_cast<char*>(workspace);
  m.workspace_bytes = faults.workspace_bytes;
  m.outputs = d_layout->rows, m.rows = d_layout->cols, m.inputs = a_layout->rows;
  m.a_ld = a_layout->ld, m.b_ld = b_layout->ld, m.c_ld = c_layout->ld, m.d_ld = d_layout->ld;
  m.slow_us = absl::ToInt64Microseconds(faults.slow);
  m.alpha = *static_cast<const float*>(alpha);
  m.beta = *static_cast<const float*>(beta);
  m.chains = Chains(*algorithm);
  m.splits = static_cast<int32_t>(algorithm->data[kSplits]);
  m.is_half = a_layout->type == kFloat16 ? 1 : 0;
  const int error =
      emulation::Submit(stream, {1, 1, kThreads, 0}, "cublaslt_matmul", emulation::Bind(MultiplyKernel, m));
  return error == 0 ? kSuccess : kExecutionFailed;
}

}  // namespace rwkv::kernels::cuda::cublaslt::fake
