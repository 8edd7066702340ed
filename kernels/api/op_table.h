// The operations of one device. All take device memory only, and a stream of that device.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/api/cast_state.h"
#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/products.h"
#include "kernels/api/sample.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"

namespace rwkv::kernels {

// Null: the device has no such operation.
struct OpTable {
  EmbedOp* embed = nullptr;
  LayerNormOp* layer_norm = nullptr;
  MixInputOp* mix_input = nullptr;
  ProductsOp* products = nullptr;
  Wkv4Op* wkv4 = nullptr;
  Wkv6Op* wkv6 = nullptr;
  Wkv7Op* wkv7 = nullptr;
  DeepEmbedOp* deep_embed = nullptr;
  // Where the host cannot read the states, one that is refused elsewhere (kDataLoss) gives rows of NaN, and stays as it
  // is if its length is what is wrong.
  DeepEmbedAttentionOp* deep_embed_attention = nullptr;
  SampleOp* sample = nullptr;         // Null: the host draws, from logits in its memory.
  CastStateOp* cast_state = nullptr;  // Not null: wkv6's and wkv7's states are to be kept in fp16.
  int64_t max_head_size = std::numeric_limits<int64_t>::max();  // Of wkv6 and wkv7.
  // Of deep_embed_attention: Q + D.
  int64_t max_attention_channels = std::numeric_limits<int64_t>::max();
};

}  // namespace rwkv::kernels
