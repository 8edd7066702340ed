// Each operation as the paper writes it: scalar float, plain loops, libm. Slow, and what every other backend is held
// to. The arithmetic itself is held to the published models' logits by the tests that run whole models.
#pragma once

#include <memory>

#include "kernels/api/op_table.h"
#include "kernels/base/device.h"

namespace rwkv::kernels::reference {

EmbedOp Embed;
LayerNormOp LayerNorm;
TokenShiftOp TokenShift;
MatmulOp Matmul;
ProductsOp Products;
GroupNormOp GroupNorm;
Wkv4Op Wkv4;
Wkv6Op Wkv6;
Wkv7PrepareOp Wkv7Prepare;
Wkv7Op Wkv7;
Wkv7OutputOp Wkv7Output;
DeepEmbedOp DeepEmbed;
DeepEmbedAttentionOp DeepEmbedAttention;

// All of them, as a table named "reference".
const OpTable& Table();

// The device "reference": host memory, one thread, these operations.
std::unique_ptr<Device> OpenDevice();

}  // namespace rwkv::kernels::reference
