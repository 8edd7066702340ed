// Which tensors a model of each version consists of: name, shape, and how a loaded model keeps it. The one place that
// says so: checking a file (model_config.h), loading a stage's weights, counting and converting all walk these tables.
// Source: the names and shapes of BlinkDL's checkpoints (RWKV-LM, RWKV-v4neo to RWKV-v7; ChatRWKV), shared by every
// release of a version.
#pragma once

#include <array>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace rwkv::checkpoint {

enum class ModelVersion : uint8_t { k4, k5_0, k5_1, k5_2, k6, k7, k7a, k7b };

inline constexpr std::array<ModelVersion, 8> kModelVersions = {
    ModelVersion::k4, ModelVersion::k5_0, ModelVersion::k5_1, ModelVersion::k5_2,
    ModelVersion::k6, ModelVersion::k7,   ModelVersion::k7a,  ModelVersion::k7b};

absl::string_view Name(ModelVersion version);  // "4", "5.0", "5.1", "5.2", "6", "7", "7a", "7b"

// 7a and 7b: every layer looks token ids up in tables of its own, and needs the embedding for that.
inline bool HasDeepEmbed(ModelVersion version) { return version == ModelVersion::k7a || version == ModelVersion::k7b; }

// What shapes are made of.
enum class Size : uint8_t {
  kNone,            // No such dimension.
  kFive,            // 5
  kWidth,           // D
  kAttentionWidth,  // A, width of r, k and v; H * N from version 5 on
  kHeads,           // H
  kHeadSize,        // N
  kFfnWidth,        // F
  kVocabulary,      // V
  // Inner widths of low-rank pairs. Layers may differ.
  kMixRank,            // RWKV-6's token shift
  kFiveMixRanks,       // 5 * kMixRank
  kDecayRank,          // RWKV-6 and 7
  kIclrRank,           // RWKV-7, as the next two
  kValueResidualRank,  //
  kGateRank,           //
  kDeepEmbedWidth,     // RWKV-7a: n of the token's own [n, n] matrix
  kDeepEmbedTable,     // kDeepEmbedWidth squared
  kQueryWidth,         // RWKV-7b: width of the extra attention's queries and keys
  kCacheWidth,         // RWKV-7b: width of a cached row
  kCount
};

absl::string_view Name(Size size);  // For messages: "width", "decay rank", ...

// Sizes that each layer has for itself.
inline bool IsRank(Size size) { return size >= Size::kMixRank && size < Size::kCount; }

// The value of every symbol in one layer; 0: not known. Kept true: A = H * N, the squares and multiples of ranks.
class Sizes {
 public:
  int64_t operator[](Size size) const { return values_[static_cast<int>(size)]; }

  // Sets a symbol, and those that follow from it. False: it contradicts what is known, is below 1, or beyond 2^30
  // (sizes cross the wire as int32, and a product of two must not overflow).
  bool Set(Size size, int64_t value);

  // Forgets what each layer has for itself.
  void ClearRanks();

 private:
  std::array<int64_t, static_cast<int>(Size::kCount)> values_ = {0, 5};  // kNone, kFive
};

// What a tensor is for, whatever its version calls it.
enum class Role : uint8_t {
  // The model's own.
  kEmbedding,
  kLn0,
  kLnOut,
  kHead,
  // Time mix.
  kLn1,
  kShiftX,     // Token shift: how much of the previous token. X: the mix that RWKV-6 makes the other mixes with.
  kShiftR,     //
  kShiftW,     //
  kShiftK,     //
  kShiftV,     //
  kShiftA,     //
  kShiftG,     //
  kShiftDown,  // RWKV-6's data-dependent part of w, k, v, r and g, in this order
  kShiftUp,    //
  kReceptance,
  kKey,
  kValue,
  kGate,
  kGateDown,
  kGateUp,
  kOutput,
  kDecay,  // What the recurrence starts from: the decay itself, its logarithm or the bias of its argument
  kDecayDown,
  kDecayUp,
  kBonus,  // u or r_k
  kIclr,
  kIclrDown,
  kIclrUp,
  kValueResidual,
  kValueResidualDown,
  kValueResidualUp,
  kKeyScale,      // k_k
  kKeyIclrScale,  // k_a
  kLnX,
  kInitialState,  // A tuned wkv state
  // Channel mix.
  kLn2,
  kFfnShiftK,
  kFfnShiftR,
  kFfnKey,
  kFfnValue,
  kFfnReceptance,
  // DeepEmbed: a gate on the channel mix's hidden units, from a table by token id.
  kDeepEmbedDown,   // s1
  kDeepEmbedUp,     // s2
  kDeepEmbedBias,   // s0
  kDeepEmbedTable,  // s_emb, to which kDeepEmbedMap times the token's embedding is added
  kDeepEmbedMap,    // s_emb_x
  // DeepEmbed with attention.
  kQuery,           // qq
  kCacheKeyDown,    // k1
  kCacheKeyUp,      // k2
  kCacheValueDown,  // v1
  kCacheValueUp,    // v2
  kKeyTable,        // k_emb, and so on as above
  kKeyMap,          //
  kValueTable,      //
  kValueMap,        //
  kQueryShift,      // x_q
  kKeyShift,        // x_k
  kValueShift,      // x_v
  kLnQuery,
  kLnKey,
  kLnValue,
  kCount
};

// How the file and a loaded model keep a tensor.
enum class Kind : uint8_t {
  kNorm,          // NAME.weight and NAME.bias, two vectors
  kVector,        // Dimensions of 1 do not count; fp32 when loaded
  kHeadVector,    // [H], loaded as [A]: a value for each channel of a head
  kMatrix,        // [out, in], applied as W x; stays in the file's type and may be quantized (NAME.scale, NAME.min)
  kLowRank,       // [in, out], applied as x M; transposed when loaded
  kLowRankStack,  // [n, in, out]: n of them, each transposed
};

// What a vector's loaded elements are of the file's.
enum class Transform : uint8_t { kNone, kOneMinus, kExp, kMinusExp, kExpMinusExp };

enum class Presence : uint8_t {
  kAlways,
  kOptional,     // Of a norm: both or neither.
  kNotInLayer0,  // Layer 0 has none, or dummies of any shape, which are ignored.
};

struct ModelTensor {
  Role role;
  absl::string_view name;  // Of a layer's tensor: without "blocks.N."
  Kind kind;
  std::array<Size, 3> shape;  // In the file; kNone: no such dimension
  Transform transform = Transform::kNone;
  Presence presence = Presence::kAlways;

  int rank() const;
};

// In an order in which a symbol's first use gives its value. Two neighbours of the same role are alternatives: a file
// has exactly one of them.
absl::Span<const ModelTensor> LayerTensors(ModelVersion version);

// What is not in every layer: embedding, ln0 (absent: the embedding is normalised already), ln_out and head. The same
// for all versions.
absl::Span<const ModelTensor> ModelTensors();

// Neighbours in a row of a quantized matrix that share a scale: `groups` of them cover `cols` columns. 0: no such
// grouping. Files have groups of 64 (ours) or 32 (ggml's).
int64_t QuantizationGroup(int64_t cols, int64_t groups);

}  // namespace rwkv::checkpoint
