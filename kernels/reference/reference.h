// Each operation as the paper writes it: scalar float, plain loops, libm. Slow, and what every other backend is held
// to. The arithmetic itself is held to the published models' logits by the tests that run whole models.
#pragma once

#include "kernels/api/op_table.h"

namespace rwkv::kernels::reference {

EmbedOp Embed;
LayerNormOp LayerNorm;
TokenShiftOp TokenShift;
MatmulOp Matmul;
Wkv7PrepareOp Wkv7Prepare;
Wkv7Op Wkv7;
Wkv7OutputOp Wkv7Output;

// All of them, as a table named "reference".
const OpTable& Table();

}  // namespace rwkv::kernels::reference
