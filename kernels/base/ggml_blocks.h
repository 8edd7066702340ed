// ggml's block-quantized weights, as GGUF and rwkv.cpp files hold them. The weights of a row in blocks of 32 (the K
// types: 256), each with its scale d and, in some, a minimum m; fp16, little-endian:
//   Q4_0   d, 16 bytes of nibbles            w = (q - 8) d
//   Q4_1   d, m, nibbles                     w = q d + m
//   Q5_0   d, u32 of fifth bits, nibbles     w = (q - 16) d
//   Q5_1   d, m, u32, nibbles                w = q d + m
//   Q8_0   d, 32 int8                        w = q d
//   Q4_K   d, m, 8 x (6-bit s, t), nibbles   w = q (d s) - m t                 s and t belong to 32 weights
//   Q5_K   Q4_K with fifth bits              w = q (d s) - m t
//   Q6_K   6-bit q, 16 int8 s, d             w = (q - 32) (d s)                s belongs to 16 weights
// The low nibbles of the first five are weights 0 .. 15, the high ones 16 .. 31.
// Source: ggml-org/llama.cpp, ggml/src/ggml-common.h (layouts) and ggml-quants.c (dequantize_row_*).
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"

namespace rwkv::kernels {

enum class BlockType : uint8_t { kNone, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K };

// What a reader wants of the blocks. The last three make a pair of quants and scales (w = q * scale + minimum), exactly
// the same weights.
enum class BlockPart : uint8_t {
  kWeights,   // fp32, each the exact product and sum rounded once (K: as ggml rounds it).
  kQuants,    // int8, centred: Q4_0, Q5_0, Q8_0. Of Q4_1 the nibbles of neighbours in one uint8, the even one low.
  kScales,    // fp16
  kMinimums,  // fp16; Q4_1 only
};

int64_t BlockWeights(BlockType type);  // Weights of one block; 1 for kNone.
int64_t BlockBytes(BlockType type);    // In the file; 0 for kNone.
bool HasQuants(BlockType type);        // Whether it can be taken apart into a pair; the others are weights only.
bool HasMinimums(BlockType type);      // Whether that pair has minimums.
int64_t PartBytes(BlockType type, BlockPart part);  // Of one decoded block.
absl::string_view BlockTypeName(BlockType type);    // "Q8_0"

// Where a block's fp16 d is; those with an m have it in the two bytes behind.
int64_t ScaleOffset(BlockType type);
bool HasMinimumScale(BlockType type);

// Weight `index` of a row of blocks.
float BlockWeight(BlockType type, const uint8_t* blocks, int64_t index);

// Decodes `count` blocks to count * PartBytes bytes at `out`, which need not be aligned. The part must exist.
void DecodeBlocks(BlockType type, BlockPart part, const uint8_t* blocks, int64_t count, uint8_t* out);

}  // namespace rwkv::kernels
