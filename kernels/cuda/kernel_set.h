// What one compiler's build of the kernels offers. Arguments are already checked; a call enqueues on the stream and
// gives the runtime's error code, 0 if there is none. Nothing here knows CUDA's headers.
#pragma once

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
#include "kernels/base/dtype.h"
#include "kernels/cuda/launch_shape.h"

namespace rwkv::kernels::cuda {

constexpr int64_t kMaxHeadSize = 128;
constexpr int kMaxAttentionChannels = 4032;  // Of queries and values, together.

// Rows of inputs as another library multiplies them: the nearest numbers of the type, zeros behind the last input and
// row.
struct RoundInputsArgs {
  const float* x = nullptr;  // [rows, inputs]
  int64_t rows = 0;
  int64_t inputs = 0;
  DType dtype = DType::kBFloat16;  // Or kFloat16.
  uint16_t* to = nullptr;          // [to_rows, pitch], aligned to 8 bytes
  int64_t to_rows = 0;
  int64_t pitch = 0;  // A multiple of four.
};

// What follows such a product's sums: the bias, the activation, the gate, and the sum with y.
struct FinishProductArgs {
  const Product* product = nullptr;
  int64_t rows = 0;
  const float* sums = nullptr;  // [rows, pitch]; may be the product's y, if the pitch is its number of outputs.
  int64_t pitch = 0;
};

struct KernelSet {
  int (*embed)(const EmbedArgs& args, LaunchStream stream);
  int (*layer_norm)(const LayerNormArgs& args, LaunchStream stream);
  int (*mix_input)(const MixInputArgs& args, LaunchStream stream);
  int (*products)(const ProductsArgs& args, LaunchStream stream);
  int (*tensor_products)(const ProductsArgs& args, LaunchStream stream);  // All but fp32 weights: on tensor cores.
  // The same, but inputs of 16-bit weights are rounded to the weights' type.
  int (*rounded_products)(const ProductsArgs& args, LaunchStream stream);
  int (*round_inputs)(const RoundInputsArgs& args, LaunchStream stream);
  int (*finish_product)(const FinishProductArgs& args, LaunchStream stream);
  int (*wkv4)(const Wkv4Args& args, LaunchStream stream);
  int (*wkv6)(const Wkv6Args& args, LaunchStream stream);  // head_size <= kMaxHeadSize
  int (*wkv7)(const Wkv7Args& args, LaunchStream stream);  // head_size <= kMaxHeadSize
  int (*deep_embed)(const DeepEmbedArgs& args, LaunchStream stream);
  // Rows of k2 and v2, together, <= kMaxAttentionChannels.
  int (*deep_embed_attention)(const DeepEmbedAttentionArgs& args, LaunchStream stream);
  int (*sample)(const SampleArgs& args, LaunchStream stream);
  int (*cast_state)(const CastStateArgs& args, LaunchStream stream);
};

extern const KernelSet kDeviceKernels;    // By nvcc, for a GPU.
extern const KernelSet kEmulatedKernels;  // For tests: on this CPU.
extern const KernelSet kCheckedKernels;   // The same, every access of which the checker sees.

}  // namespace rwkv::kernels::cuda
