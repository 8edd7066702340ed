#define RWKV_KERNEL_SET kAvx512Kernels
#include "kernels/cpu/simd_kernels.h"
