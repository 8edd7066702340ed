// Subnormal results become zero: arithmetic on them costs a hundred times as much on many processors.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rwkv::kernels::cpu {

// For this thread, while it lives.
class ScopedFlushSubnormals {
 public:
#if defined(__x86_64__)
  ScopedFlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~ScopedFlushSubnormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  ScopedFlushSubnormals() : before_(Control()) { SetControl(before_ | uint64_t{1} << 24); }
  ~ScopedFlushSubnormals() { SetControl(before_); }
#endif
  ScopedFlushSubnormals(const ScopedFlushSubnormals&) = delete;
  ScopedFlushSubnormals& operator=(const ScopedFlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  const unsigned int before_;
#elif defined(__aarch64__)
  static uint64_t Control() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void SetControl(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }

  const uint64_t before_;
#endif
};

}  // namespace rwkv::kernels::cpu
