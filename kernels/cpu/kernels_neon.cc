#define RWKV_KERNEL_SET kNeonKernels
#include "kernels/cpu/simd_kernels.h"
