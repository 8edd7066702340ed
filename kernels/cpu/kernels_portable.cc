#define RWKV_PORTABLE_KERNELS
#define RWKV_KERNEL_SET kPortableKernels
#include "kernels/cpu/simd_kernels.h"
