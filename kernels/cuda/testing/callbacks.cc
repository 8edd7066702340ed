#include "kernels/cuda/testing/emulation.h"

// What the instrumentation calls. With the thread sanitizer's own library that has the names, and the checker is blind.
#if !__has_feature(thread_sanitizer)
namespace {

void Report(const void* address, int bytes, bool writes, const void* caller) {
  using rwkv::kernels::cuda::emulation::CurrentObserver;
  if (auto* const observer = CurrentObserver(); observer != nullptr) {
    observer->OnAccess(address, bytes, writes, caller);
  }
}

}  // namespace

// NOLINTBEGIN: the names are clang's.
#define RWKV_TSAN_CALLBACK(bytes)                                                                                  \
  void __tsan_read##bytes(void* address) { Report(address, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* address) { Report(address, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* address) { Report(address, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* address) { Report(address, bytes, true, __builtin_return_address(0)); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
RWKV_TSAN_CALLBACK(1)
RWKV_TSAN_CALLBACK(2)
RWKV_TSAN_CALLBACK(4)
RWKV_TSAN_CALLBACK(8)
RWKV_TSAN_CALLBACK(16)
}
// NOLINTEND
#endif
