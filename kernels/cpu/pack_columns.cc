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

// Four rows of codes become columns of four, which is what lies side by side in a line (Columns::place).
using Bytes = uint8_t __attribute__((vector_size(16)));
using Fours = uint32_t __attribute__((vector_size(16)));

Bytes LoadBytes(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bytes;
}

// Inputs [0, 16) of four rows that follow each other at `stride`, to lines that do.
void PackSixteen(const uint8_t* from, int64_t stride, uint8_t* to) {
  const Bytes a = LoadBytes(from), b = LoadBytes(from + stride);
  const Bytes c = LoadBytes(from + 2 * stride), d = LoadBytes(from + 3 * stride);
  const auto low = [](Bytes x, Bytes y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  };
  const auto high = [](Bytes x, Bytes y) {
    return __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  };
  const auto low_pairs = [](Bytes x, Bytes y) {
    return __builtin_shufflevector(x, y, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  };
  const auto high_pairs = [](Bytes x, Bytes y) {
    return __builtin_shufflevector(x, y, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
  };
  const Bytes ab = low(a, b), cd = low(c, d), ab_high = high(a, b), cd_high = high(c, d);
  const Bytes quarters[] = {low_pairs(ab, cd), high_pairs(ab, cd), low_pairs(ab_high, cd_high),
                            high_pairs(ab_high, cd_high)};
  for (const Bytes& quarter : quarters) {
    const auto fours = reinterpret_cast<Fours>(quarter);
    for (int i = 0; i < 4; ++i, to += Columns::kOutputs) {
      const uint32_t four = fours[i];
      std::memcpy(to, &four, sizeof(four));
    }
  }
}

// A block of up to 64 outputs; `to` is zeros.
void PackBlock(const MatrixView& matrix, const Columns& columns, int64_t block, uint8_t* to) {
  const int64_t first = block * Columns::kOutputs;
  const int64_t count = std::min(Columns::kOutputs, matrix.rows - first);
  const uint8_t* const codes = static_cast<const uint8_t*>(matrix.data) + first * matrix.cols;
  uint8_t* const lines = to + columns.codes(block);
  constexpr int64_t kAtOnce = 64;  // A cache line of each output, and as many columns as stay in the cache.
  for (int64_t begin = 0; begin < matrix.cols; begin += kAtOnce) {
    const int64_t end = std::min(begin + kAtOnce, matrix.cols);
    for (int64_t o = 0; o < count; o += 4) {
      const int64_t outputs = std::min<int64_t>(count - o, 4);
      const uint8_t* const from = codes + o * matrix.cols;
      uint8_t* const place = lines + Columns::place(o);
      int64_t i = begin;
      for (; outputs == 4 && i + 16 <= end; i += 16) PackSixteen(from + i, matrix.cols, place + i * Columns::kOutputs);
      for (; i < end; ++i) {
        for (int64_t k = 0; k < outputs; ++k) place[i * Columns::kOutputs + k] = from[k * matrix.cols + i];
      }
    }
  }
  auto* const scales = reinterpret_cast<uint16_t*>(to + columns.scales(block));
  for (int64_t o = 0; o < count; ++o) {
    for (int64_t g = 0; g < columns.groups; ++g) {
      scales[g * Columns::kOutputs + o] = matrix.scales[(first + o) * columns.groups + g];
    }
  }
}

}  // namespace

absl::StatusOr<Buffer> PackColumns(const MatrixView& matrix, ThreadTeam& team) {
  const Columns columns(matrix);
  RWKV_ASSIGN_OR_RETURN(Buffer buffer, AllocateOnHost(columns.bytes()));
  AdviseLargePages(buffer);
  auto* const to = buffer.as<uint8_t>();
  team.Run(columns.blocks, [&](int64_t block, int) { PackBlock(matrix, columns, block, to); });
  return buffer;
}

}  // namespace rwkv::kernels::cpu
