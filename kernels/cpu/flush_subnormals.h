// Subnormal results become zero: arithmetic on them costs a hundred times as much on x86. Elsewhere nothing happens:
// aarch64 computes with them at full speed, and could only flush what is read as well, so weights would change.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rwkv::kernels::cpu {

// For this thread, while it lives; with `flush` false the opposite, for what is not an operation.
class ScopedFlushSubnormals {
 public:
#if defined(__x86_64__)
  explicit ScopedFlushSubnormals(bool flush = true) : before_(_mm_getcsr()) {
    _mm_setcsr(flush ? before_ | _MM_FLUSH_ZERO_ON : before_ & ~static_cast<unsigned int>(_MM_FLUSH_ZERO_MASK));
  }
  ~ScopedFlushSubnormals() { _mm_setcsr(before_); }
#else
  explicit ScopedFlushSubnormals(bool /*flush*/ = true) {}
#endif
  ScopedFlushSubnormals(const ScopedFlushSubnormals&) = delete;
  ScopedFlushSubnormals& operator=(const ScopedFlushSubnormals&) = delete;

#if defined(__x86_64__)

 private:
  const unsigned int before_;
#endif
};

}  // namespace rwkv::kernels::cpu
