// Subnormal results become zero: arithmetic on them costs a hundred times as much on x86. Elsewhere nothing happens:
// aarch64 computes with them at full speed, and could only flush what is read as well, so weights would change.
#pragma once

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
#else
  ScopedFlushSubnormals() {}
#endif
  ScopedFlushSubnormals(const ScopedFlushSubnormals&) = delete;
  ScopedFlushSubnormals& operator=(const ScopedFlushSubnormals&) = delete;

#if defined(__x86_64__)

 private:
  const unsigned int before_;
#endif
};

}  // namespace rwkv::kernels::cpu
