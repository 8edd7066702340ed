// The operations of one backend. Who computes takes a table once (kernels/dispatch) and calls through it.
#pragma once

#include "absl/strings/string_view.h"
#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/group_norm.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/matmul.h"
#include "kernels/api/products.h"
#include "kernels/api/token_shift.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"

namespace rwkv::kernels {

struct OpTable {
  absl::string_view name;  // "reference", "cpu/portable", "cpu/avx2", "cpu/avx512"
  // Tables of one family give the same bits, so sequences may move between machines that choose different ones.
  absl::string_view numeric_family;  // "reference", "cpu/portable", "cpu/fma"
  EmbedOp* embed = nullptr;
  LayerNormOp* layer_norm = nullptr;
  TokenShiftOp* token_shift = nullptr;
  MatmulOp* matmul = nullptr;
  ProductsOp* products = nullptr;
  GroupNormOp* group_norm = nullptr;
  Wkv4Op* wkv4 = nullptr;
  Wkv6Op* wkv6 = nullptr;
  Wkv7PrepareOp* wkv7_prepare = nullptr;
  Wkv7Op* wkv7 = nullptr;
  Wkv7OutputOp* wkv7_output = nullptr;
  DeepEmbedOp* deep_embed = nullptr;
  DeepEmbedAttentionOp* deep_embed_attention = nullptr;
};

}  // namespace rwkv::kernels
