#include "kernels/base/ggml_blocks.h"

#include <cstring>

#include "kernels/base/dtype.h"

namespace rwkv::kernels {
namespace {

constexpr int kSmall = 32;
constexpr int kLarge = 256;

float LoadHalf(const uint8_t* bytes) { return HalfToFloat(static_cast<uint16_t>(bytes[0] | bytes[1] << 8)); }

// The 32 whole numbers of a block: 0 .. 15, 0 .. 31 or -128 .. 127, as stored.
void LoadQuants(BlockType type, const uint8_t* block, int* quants) {
  if (type == BlockType::kQ8_0) {
    for (int i = 0; i < kSmall; ++i) quants[i] = static_cast<int8_t>(block[2 + i]);
    return;
  }
  const bool has_minimum = type == BlockType::kQ4_1 || type == BlockType::kQ5_1;
  const uint8_t* at = block + (has_minimum ? 4 : 2);
  uint32_t fifth = 0;
  if (type == BlockType::kQ5_0 || type == BlockType::kQ5_1) {
    for (int i = 0; i < 4; ++i) fifth |= uint32_t{at[i]} << (8 * i);
    at += 4;
  }
  for (int i = 0; i < kSmall / 2; ++i) {
    quants[i] = (at[i] & 15) | static_cast<int>(fifth >> i & 1) << 4;
    quants[i + 16] = (at[i] >> 4) | static_cast<int>(fifth >> (i + 16) & 1) << 4;
  }
}

int Centre(BlockType type) {
  switch (type) {
    case BlockType::kQ4_0:
      return 8;
    case BlockType::kQ5_0:
      return 16;
    default:
      return 0;
  }
}

// The j-th 6-bit scale and minimum of a K block's twelve bytes.
void LoadScaleAndMinimum(const uint8_t* packed, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
    return;
  }
  *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
  *minimum = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4;
}

// Each of these decodes the weights 32 j .. 32 j + 31 of a block.

void DecodeQ4KOrQ5K(bool has_fifth_bits, const uint8_t* block, int j, float* weights) {
  const uint8_t* fifth = block + 16;
  const uint8_t* nibbles = (has_fifth_bits ? fifth + 32 : fifth) + j / 2 * 32;  // Two of the eight share 32 bytes.
  int scale = 0;
  int minimum = 0;
  LoadScaleAndMinimum(block + 4, j, &scale, &minimum);
  const float step = LoadHalf(block) * static_cast<float>(scale);
  const float offset = LoadHalf(block + 2) * static_cast<float>(minimum);
  for (int i = 0; i < kSmall; ++i) {
    int q = j % 2 == 0 ? nibbles[i] & 15 : nibbles[i] >> 4;
    if (has_fifth_bits) q |= (fifth[i] >> j & 1) << 4;
    weights[i] = step * static_cast<float>(q) - offset;
  }
}

void DecodeQ6K(const uint8_t* block, int j, float* weights) {
  const int quarter = j % 4;  // Of the half: which bits of the bytes that four weights share.
  const uint8_t* low = block + j / 4 * 64 + quarter % 2 * 32;
  const uint8_t* high = block + 128 + j / 4 * 32;
  const uint8_t* scales = block + 192 + 2 * j;
  const float d = LoadHalf(block + 208);
  for (int i = 0; i < kSmall; ++i) {
    const int q = (quarter < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> (2 * quarter) & 3) << 4;
    weights[i] = d * static_cast<float>(static_cast<int8_t>(scales[i / 16])) * static_cast<float>(q - 32);
  }
}

void DecodeThirtyTwo(BlockType type, const uint8_t* block, int j, float* weights) {
  switch (type) {
    case BlockType::kQ4_K:
    case BlockType::kQ5_K:
      return DecodeQ4KOrQ5K(type == BlockType::kQ5_K, block, j, weights);
    case BlockType::kQ6_K:
      return DecodeQ6K(block, j, weights);
    default:
      break;
  }
  int quants[kSmall];
  LoadQuants(type, block, quants);
  const float d = LoadHalf(block);
  const float m = type == BlockType::kQ4_1 || type == BlockType::kQ5_1 ? LoadHalf(block + 2) : 0;
  for (int i = 0; i < kSmall; ++i) {
    const float product = static_cast<float>(quants[i] - Centre(type)) * d;  // Exact: at most 8 and 11 bits.
    weights[i] = product + m;
  }
}

void DecodeQuants(BlockType type, const uint8_t* block, uint8_t* out) {
  if (type == BlockType::kQ8_0) {
    std::memcpy(out, block + 2, kSmall);
    return;
  }
  int quants[kSmall];
  LoadQuants(type, block, quants);
  for (int i = 0; i < kSmall; ++i) {
    if (!HasMinimums(type)) {
      out[i] = static_cast<uint8_t>(static_cast<int8_t>(quants[i] - Centre(type)));
    } else if (i % 2 == 0) {
      out[i / 2] = static_cast<uint8_t>(quants[i] | quants[i + 1] << 4);
    }
  }
}

}  // namespace

int64_t BlockWeights(BlockType type) {
  switch (type) {
    case BlockType::kNone:
      return 1;
    case BlockType::kQ4_K:
    case BlockType::kQ5_K:
    case BlockType::kQ6_K:
      return kLarge;
    default:
      return kSmall;
  }
}

int64_t BlockBytes(BlockType type) {
  switch (type) {
    case BlockType::kNone:
      return 0;
    case BlockType::kQ4_0:
      return 18;
    case BlockType::kQ4_1:
      return 20;
    case BlockType::kQ5_0:
      return 22;
    case BlockType::kQ5_1:
      return 24;
    case BlockType::kQ8_0:
      return 34;
    case BlockType::kQ4_K:
      return 144;
    case BlockType::kQ5_K:
      return 176;
    case BlockType::kQ6_K:
      return 210;
  }
  return 0;
}

bool HasQuants(BlockType type) {
  return type == BlockType::kQ4_0 || type == BlockType::kQ4_1 || type == BlockType::kQ5_0 || type == BlockType::kQ8_0;
}

bool HasMinimums(BlockType type) { return type == BlockType::kQ4_1; }

int64_t PartBytes(BlockType type, BlockPart part) {
  switch (part) {
    case BlockPart::kWeights:
      return BlockWeights(type) * static_cast<int64_t>(sizeof(float));
    case BlockPart::kQuants:
      return HasMinimums(type) ? kSmall / 2 : kSmall;
    case BlockPart::kScales:
    case BlockPart::kMinimums:
      return 2;
  }
  return 0;
}

absl::string_view BlockTypeName(BlockType type) {
  switch (type) {
    case BlockType::kNone:
      return "none";
    case BlockType::kQ4_0:
      return "Q4_0";
    case BlockType::kQ4_1:
      return "Q4_1";
    case BlockType::kQ5_0:
      return "Q5_0";
    case BlockType::kQ5_1:
      return "Q5_1";
    case BlockType::kQ8_0:
      return "Q8_0";
    case BlockType::kQ4_K:
      return "Q4_K";
    case BlockType::kQ5_K:
      return "Q5_K";
    case BlockType::kQ6_K:
      return "Q6_K";
  }
  return "unknown";
}

bool HasMinimumScale(BlockType type) {
  return type == BlockType::kQ4_1 || type == BlockType::kQ5_1 || type == BlockType::kQ4_K || type == BlockType::kQ5_K;
}

int64_t ScaleOffset(BlockType type) { return type == BlockType::kQ6_K ? 208 : 0; }

float BlockWeight(BlockType type, const uint8_t* blocks, int64_t index) {
  const int64_t in_block = index % BlockWeights(type);
  float weights[kSmall];
  DecodeThirtyTwo(type, blocks + index / BlockWeights(type) * BlockBytes(type), static_cast<int>(in_block / kSmall),
                  weights);
  return weights[in_block % kSmall];
}

void DecodeBlocks(BlockType type, BlockPart part, const uint8_t* blocks, int64_t count, uint8_t* out) {
  const int64_t stride = BlockBytes(type);
  const int64_t size = PartBytes(type, part);
  for (int64_t n = 0; n < count; ++n, blocks += stride, out += size) {
    switch (part) {
      case BlockPart::kWeights: {
        float weights[kLarge];
        for (int j = 0; j < BlockWeights(type) / kSmall; ++j) DecodeThirtyTwo(type, blocks, j, weights + j * kSmall);
        std::memcpy(out, weights, static_cast<size_t>(size));
        break;
      }
      case BlockPart::kQuants:
        DecodeQuants(type, blocks, out);
        break;
      case BlockPart::kScales:
        std::memcpy(out, blocks, 2);
        break;
      case BlockPart::kMinimums:
        std::memcpy(out, blocks + 2, 2);
        break;
    }
  }
}

}  // namespace rwkv::kernels
