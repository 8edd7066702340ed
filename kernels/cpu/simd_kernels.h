// The operations on vectors of 16 floats, compiled once by each kernels_*.cc, which names its KernelSet in
// RWKV_KERNEL_SET. Law N1 holds because every element is computed in an order that its own row's length alone decides:
// sums run in steps of 16 lanes from the first element on, one accumulator for each, the tail filled up with zeros,
// then the tree of Sum(). Tiles and blocks choose which elements are computed side by side, never how one is computed.
#pragma once

#include "kernels/cpu/deep_embed_kernels.h"
#include "kernels/cpu/kernel_set.h"
#include "kernels/cpu/mix_kernels.h"
#include "kernels/cpu/product_kernels.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"
#include "kernels/cpu/wkv_kernels.h"

namespace rwkv::kernels::cpu {
namespace {

// --- Functions, for their tests ---

template <F32 (*kFunction)(F32)>
void Map(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kLanes) StoreSome(y + i, kFunction(LoadSome(x + i, count - i)), count - i);
}

}  // namespace

const KernelSet RWKV_KERNEL_SET = {
    Embed,
    LayerNorm,
    DeepEmbed,
    MixInput,
    MixInputState,
    MatmulPreparedBytes,
    PrepareRows,
    MatmulParts,
    MatmulWorkspaceBytes,
    Matmul,
    Wkv4,
    Wkv6,
    Wkv7,
    Wkv7ScratchFloats,
    DeepEmbedAttentionWorkspaceBytes,
    DeepEmbedAttention,
    Map<Exp>,
    Map<Sigmoid>,
    Map<Tanh>,
};

}  // namespace rwkv::kernels::cpu
