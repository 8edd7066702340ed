#include "kernels/base/aligned_buffer.h"

#include <cstdlib>
#include <cstring>

namespace rwkv::kernels::internal {

void* AllocateAligned(int64_t bytes) {
  const int64_t rounded = (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
  void* memory = std::aligned_alloc(kBufferAlignment, static_cast<size_t>(rounded));
  if (memory != nullptr) std::memset(memory, 0, static_cast<size_t>(rounded));
  return memory;
}

void FreeAligned::operator()(void* memory) const { std::free(memory); }

}  // namespace rwkv::kernels::internal
