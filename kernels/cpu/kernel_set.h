// What one instruction set's build of simd_kernels.h offers. Arguments are already checked, memory is already there.
#pragma once

#include <cstdint>

#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/group_norm.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/matmul.h"
#include "kernels/api/token_shift.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"

namespace rwkv::kernels::cpu {

struct KernelSet {
  void (*embed)(const EmbedArgs& args);
  void (*layer_norm)(const LayerNormArgs& args);
  void (*token_shift)(const TokenShiftArgs& args);
  int64_t (*matmul_workspace_bytes)(const MatmulArgs& args);
  void (*matmul)(const MatmulArgs& args, void* workspace);  // workspace: 64-byte aligned; null if none is needed
  void (*group_norm)(const GroupNormArgs& args);
  void (*wkv4)(const Wkv4Args& args);
  void (*wkv6)(const Wkv6Args& args);
  void (*wkv7_prepare)(const Wkv7PrepareArgs& args);
  void (*wkv7)(const Wkv7Args& args);
  void (*wkv7_output)(const Wkv7OutputArgs& args);
  int64_t (*deep_embed_workspace_bytes)(const DeepEmbedArgs& args);
  void (*deep_embed)(const DeepEmbedArgs& args, void* workspace);
  int64_t (*deep_embed_attention_workspace_bytes)(const DeepEmbedAttentionArgs& args);
  void (*deep_embed_attention)(const DeepEmbedAttentionArgs& args, void* workspace);
  // The functions inside the operations, element by element, for their own tests.
  void (*exp)(const float* x, int64_t count, float* y);
  void (*sigmoid)(const float* x, int64_t count, float* y);
  void (*tanh)(const float* x, int64_t count, float* y);
};

extern const KernelSet kPortableKernels;
extern const KernelSet kAvx2Kernels;    // needs AVX2, FMA, F16C
extern const KernelSet kAvx512Kernels;  // needs AVX-512 F, BW, DQ, VL, and the above

}  // namespace rwkv::kernels::cpu
