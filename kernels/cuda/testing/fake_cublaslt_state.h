// What the parts of the fake cuBLASLt share.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/synchronization/mutex.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/testing/fake_cublaslt.h"

namespace rwkv::kernels::cuda::cublaslt {

// What handles point to here.
struct Context {
  int major = 0;
};
struct MatmulDesc {
  int compute_type = 0;
  int scale_type = 0;
  int32_t trans_a = 0;
};
struct MatrixLayout {
  int type = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
};
struct Preference {
  uint64_t workspace_bytes = 0;  // The library's own defaults.
  uint32_t reduction_schemes = 7;
  uint32_t alignments[4] = {256, 256, 256, 256};
};

namespace fake {

constexpr uint64_t kMagic = 0x6c742d66616b65;
constexpr int kWorkspaceAlignment = 256;
constexpr uint32_t kVectorBytes = 16;     // What its algorithms load at once.
constexpr uint32_t kMostAlignment = 256;  // What it assumes where nobody says anything.

// The words of an algorithm. kAlignments: of A, B, C and D, 16 bits each, as who looked for it said.
enum Word { kOf, kDevice, kRows, kCols, kInputs, kAlignments, kNumber, kSplits };

// kDevice: the number of the device's generation, and what it multiplies.
inline uint64_t DeviceWord(int major, int type) {
  return static_cast<uint64_t>(major) << 32 | static_cast<uint32_t>(type);
}
inline uint32_t AlignmentOf(const Algorithm& algorithm, int operand) {
  return static_cast<uint32_t>(algorithm.data[kAlignments] >> (16 * operand) & 0xffffu);
}

struct Fake {
  absl::Mutex mu;
  FakeFaults faults;
  FakeCounts counts;
  std::map<const void*, const char*> live;  // Everything that was created, and what it is.
};

Fake& TheFake();

// Tells the fake runtime of it.
Result Violate(std::string what, Result result = kInvalidValue);

constexpr char kContext[] = "context";
constexpr char kDesc[] = "description of a product";
constexpr char kLayout[] = "layout";
constexpr char kPreference[] = "preference";

bool IsLive(const void* handle, const char* what);

inline int64_t BytesOf(int type) { return type == kFloat32 ? 4 : 2; }

struct Operands {
  const MatrixLayout* a;
  const MatrixLayout* b;
  const MatrixLayout* c;
  const MatrixLayout* d;
};

// Whether they fit together, and are what it computes: [outputs, rows] = [inputs, outputs]^T [inputs, rows].
Result CheckOperands(const char* what, const Context* context, const MatmulDesc* desc, const Operands& of);
// Whether it is one of this device and these shapes.
Result CheckAlgorithm(const char* what, const Context& context, const Operands& of, const Algorithm* algorithm);

// How many sums an algorithm adds up.
inline int Chains(const Algorithm& algorithm) { return 1 << algorithm.data[kNumber] % 3; }

// Of the table.
Result Matmul(Context* context, MatmulDesc* desc, const void* alpha, const void* a, MatrixLayout* a_layout,
              const void* b, MatrixLayout* b_layout, const void* beta, const void* c, MatrixLayout* c_layout, void* d,
              MatrixLayout* d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
              StreamHandle stream);

}  // namespace fake
}  // namespace rwkv::kernels::cuda::cublaslt
