// What one instruction set's build of simd_kernels.h offers. Arguments are already checked, memory is already there.
// An operation is cut into parts that threads may compute side by side in any order: none writes what another reads or
// writes, and no sum crosses them.
#pragma once

#include <cstdint>

#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/cpu/matmul.h"

namespace rwkv::kernels::cpu {

struct KernelSet {
  // Rows [begin, end).
  void (*embed)(const EmbedArgs& args, int64_t begin, int64_t end);
  void (*layer_norm)(const LayerNormArgs& args, int64_t begin, int64_t end);
  void (*deep_embed)(const DeepEmbedArgs& args, int64_t begin, int64_t end);

  // Rows [begin, end), and the states of the spans that lie inside; those that do not are left to mix_input_state.
  // `scratch`: 2 * width floats.
  void (*mix_input)(const MixInputArgs& args, int64_t begin, int64_t end, float* scratch);
  // What the span leaves as its state, once all rows are done.
  void (*mix_input_state)(const MixInputArgs& args, const SequenceSpan& span);

  // Memory for a product's rows as it wants to read them, 0 if that is how they are; and what puts rows [begin, end)
  // there, for all rows before any part; `begin` is a multiple of 8.
  int64_t (*matmul_prepared_bytes)(const MatmulArgs& args);
  void (*prepare_rows)(const MatmulArgs& args, int64_t begin, int64_t end);
  // Parts of a product, and what a part needs.
  int64_t (*matmul_parts)(const MatmulArgs& args);
  int64_t (*matmul_workspace_bytes)(const MatmulArgs& args);
  void (*matmul)(const MatmulArgs& args, int64_t part, void* workspace);  // workspace: 64-byte aligned

  // Channels [begin, end) of a span.
  void (*wkv4)(const Wkv4Args& args, const SequenceSpan& span, int64_t begin, int64_t end);
  // One head of a span.
  void (*wkv6)(const Wkv6Args& args, const SequenceSpan& span, int64_t head);
  void (*wkv7)(const Wkv7Args& args, const SequenceSpan& span, int64_t head, float* scratch);
  int64_t (*wkv7_scratch_floats)(int64_t head_size);

  // For any span of the step.
  int64_t (*deep_embed_attention_workspace_bytes)(const DeepEmbedAttentionArgs& args);
  // A span.
  void (*deep_embed_attention)(const DeepEmbedAttentionArgs& args, const SequenceSpan& span, void* workspace);

  // The functions inside the operations, element by element, for their own tests.
  void (*exp)(const float* x, int64_t count, float* y);
  void (*sigmoid)(const float* x, int64_t count, float* y);
  void (*tanh)(const float* x, int64_t count, float* y);
};

extern const KernelSet kPortableKernels;
extern const KernelSet kNeonKernels;        // aarch64
extern const KernelSet kAvx2Kernels;        // needs AVX2, FMA, F16C
extern const KernelSet kAvx512Kernels;      // needs AVX-512 F, BW, DQ, VL, and the above
extern const KernelSet kAvx512VnniKernels;  // needs AVX-512 VNNI, and the above
extern const KernelSet kAmxKernels;         // needs AMX's tiles of bytes and of bf16, and the above
// As kAmxKernels, the tiles in plain code: the plain twin, for tests. Needs AVX-512 VNNI.
extern const KernelSet kEmulatedAmxKernels;

}  // namespace rwkv::kernels::cpu
