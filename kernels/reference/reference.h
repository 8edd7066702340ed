// Each operation as the paper writes it: compositions of the pieces in pieces.h. Slow, and what every other backend is
// held to. The arithmetic itself is held to the published models' logits by the tests that run whole models.
#pragma once

#include <memory>

#include "kernels/api/op_table.h"
#include "kernels/base/device.h"

namespace rwkv::kernels::reference {

EmbedOp Embed;
LayerNormOp LayerNorm;
MixInputOp MixInput;
ProductsOp Products;
Wkv4Op Wkv4;
Wkv6Op Wkv6;
Wkv7Op Wkv7;
DeepEmbedOp DeepEmbed;
DeepEmbedAttentionOp DeepEmbedAttention;

// The device "reference": host memory, one thread, these operations.
std::unique_ptr<Device> OpenDevice();

}  // namespace rwkv::kernels::reference
