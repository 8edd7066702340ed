#define RWKV_HAS_PAIRS
#define RWKV_KERNEL_SET kAvx512VnniKernels
#include "kernels/cpu/simd_kernels.h"
