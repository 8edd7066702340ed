#include "kernels/cpu/pack_columns.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "kernels/base/host_device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/columns.h"

namespace rwkv::kernels::cpu {
namespace {

// Where whole ones fit: columns are read here and there, and each page costs a look at its address.
void AdviseLargePages(const Buffer& buffer) {
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(buffer.data());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (begin + static_cast<uintptr_t>(buffer.size_in_bytes())) / kLargePage * kLargePage;
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // It works without, too.
}

}  // namespace

absl::StatusOr<Buffer> PackColumns(const MatrixView& matrix) {
  const Columns columns(matrix);
  RWKV_ASSIGN_OR_RETURN(Buffer buffer, AllocateOnHost(columns.bytes()));
  AdviseLargePages(buffer);
  std::memset(buffer.data(), 0, static_cast<size_t>(columns.bytes()));
  const auto* const codes = static_cast<const uint8_t*>(matrix.data);
  constexpr int64_t kInputsAtOnce = 64;  // A cache line of each output, and as many columns as stay in the cache.
  for (int64_t block = 0; block < columns.blocks; ++block) {
    const int64_t first = block * Columns::kOutputs;
    const int64_t count = std::min(Columns::kOutputs, matrix.rows - first);
    uint8_t* const to = buffer.as<uint8_t>() + columns.codes(block);
    for (int64_t begin = 0; begin < matrix.cols; begin += kInputsAtOnce) {
      const int64_t end = std::min(begin + kInputsAtOnce, matrix.cols);
      for (int64_t o = 0; o < count; ++o) {
        const uint8_t* const from = codes + (first + o) * matrix.cols;
        uint8_t* const place = to + Columns::place(o);
        for (int64_t i = begin; i < end; ++i) place[i * Columns::kOutputs] = from[i];
      }
    }
    auto* const scales = reinterpret_cast<uint16_t*>(buffer.as<uint8_t>() + columns.scales(block));
    for (int64_t o = 0; o < count; ++o) {
      for (int64_t g = 0; g < columns.groups; ++g) {
        scales[g * Columns::kOutputs + o] = matrix.scales[(first + o) * columns.groups + g];
      }
    }
  }
  return buffer;
}

}  // namespace rwkv::kernels::cpu
