#define RWKV_KERNEL_SET kAmxKernels
#include "kernels/cpu/simd_kernels.h"

#if !defined(RWKV_HAS_TILES)
#error "this compiler has other names for AMX"
#endif
