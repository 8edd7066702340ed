// How many rows products by another library have (library_products.h).
#pragma once

#include <cstdint>
#include <vector>

namespace rwkv::kernels::cuda {

// Products of this many rows and more are cuBLASLt's. With fewer, on an H200, their time is the weights' bytes: it has
// 206 operations for each byte that it reads, of which mma.sync reaches some 0.6.
constexpr int64_t kLibraryRows = 128;
constexpr int64_t kMostLibraryRows = 4096;  // Of one call; more are several.

// Numbers of rows to which products of `least` rows and more are padded: from there half as many again and twice as
// many in turn, up to kMostLibraryRows.
inline std::vector<int64_t> LibraryBuckets(int64_t least) {
  std::vector<int64_t> buckets;
  for (int64_t rows = least; rows < kMostLibraryRows; rows *= 2) {
    buckets.push_back(rows);
    if (rows + rows / 2 < kMostLibraryRows) buckets.push_back(rows + rows / 2);
  }
  buckets.push_back(kMostLibraryRows);
  return buckets;
}

}  // namespace rwkv::kernels::cuda
