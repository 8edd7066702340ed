#include "kernels/base/aligned_buffer.h"

#include <cstdint>
#include <cstdlib>

namespace rwkv::kernels::internal {

// calloc leaves a large buffer to the kernel, whose zeros cost memory only where somebody writes. What it gave is kept
// before the aligned place: calloc aligns to 16, so there is room for a pointer.
void* AllocateAligned(int64_t bytes) {
  void* const memory = std::calloc(1, static_cast<size_t>(bytes + kBufferAlignment));
  if (memory == nullptr) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  void** const aligned = reinterpret_cast<void**>((address / kBufferAlignment + 1) * kBufferAlignment);
  aligned[-1] = memory;
  return aligned;
}

void FreeAligned::operator()(void* memory) const { std::free(static_cast<void**>(memory)[-1]); }

}  // namespace rwkv::kernels::internal
