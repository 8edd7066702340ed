#define RWKV_EMULATED_TILES
#define RWKV_KERNEL_SET kEmulatedAmxKernels
#include "kernels/cpu/simd_kernels.h"
