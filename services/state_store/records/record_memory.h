// Memory for the bytes of a record, fit for files that are read and written past the page cache.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace rwkv::state_store {

inline constexpr size_t kRecordAlignment = 4096;  // No disk has larger blocks.

inline size_t WholeBlocks(size_t bytes) { return (bytes + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment; }

struct FreeRecordMemory {
  void operator()(char* memory) const { ::operator delete (memory, std::align_val_t{kRecordAlignment}); }
};
using RecordMemory = std::unique_ptr<char, FreeRecordMemory>;

// Aligned, contents undefined, and never null. Takes up memory only as far as it is written to.
inline RecordMemory NewRecordMemory(size_t bytes) {
  return RecordMemory(static_cast<char*>(::operator new (bytes, std::align_val_t{kRecordAlignment})));
}

}  // namespace rwkv::state_store
