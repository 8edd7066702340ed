#define RWKV_KERNEL_SET kAvx2Kernels
#include "kernels/cpu/simd_kernels.h"
