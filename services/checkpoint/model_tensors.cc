#include "services/checkpoint/model_tensors.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

namespace rwkv::checkpoint {
namespace {

constexpr Size D = Size::kWidth;
constexpr Size A = Size::kAttentionWidth;
constexpr Size H = Size::kHeads;
constexpr Size N = Size::kHeadSize;
constexpr Size F = Size::kFfnWidth;
constexpr Size V = Size::kVocabulary;
constexpr Kind kNorm = Kind::kNorm;
constexpr Kind kVector = Kind::kVector;
constexpr Kind kMatrix = Kind::kMatrix;
constexpr Kind kLowRank = Kind::kLowRank;
constexpr Presence kOptional = Presence::kOptional;
constexpr Presence kNotInLayer0 = Presence::kNotInLayer0;

// ln_out comes first: a vector, whose width no quantization hides.
constexpr ModelTensor kModel[] = {
    {Role::kLnOut, "ln_out", kNorm, {D}},
    {Role::kEmbedding, "emb.weight", kMatrix, {V, D}},
    {Role::kHead, "head.weight", kMatrix, {V, D}},
    {Role::kLn0, "blocks.0.ln0", kNorm, {D}, Transform::kNone, kOptional},
};

constexpr ModelTensor kBlock[] = {
    {Role::kLn1, "ln1", kNorm, {D}},
    {Role::kLn2, "ln2", kNorm, {D}},
    {Role::kReceptance, "att.receptance.weight", kMatrix, {A, D}},
    {Role::kKey, "att.key.weight", kMatrix, {A, D}},
    {Role::kValue, "att.value.weight", kMatrix, {A, D}},
    {Role::kOutput, "att.output.weight", kMatrix, {D, A}},
    {Role::kFfnKey, "ffn.key.weight", kMatrix, {F, D}},
    {Role::kFfnValue, "ffn.value.weight", kMatrix, {D, F}},
};
constexpr ModelTensor kFfnReceptance[] = {{Role::kFfnReceptance, "ffn.receptance.weight", kMatrix, {D, D}}};
constexpr ModelTensor kGate[] = {{Role::kGate, "att.gate.weight", kMatrix, {A, D}}};
constexpr ModelTensor kGroupNorm[] = {{Role::kLnX, "att.ln_x", kNorm, {A}}};
constexpr ModelTensor kTunedState[] = {
    {Role::kInitialState, "att.time_state", kVector, {H, N, N}, Transform::kNone, kOptional}};

// RWKV-4 and 5 store how much of the current token a mix takes.
constexpr ModelTensor kTimeMix[] = {
    {Role::kShiftK, "att.time_mix_k", kVector, {D}, Transform::kOneMinus},
    {Role::kShiftV, "att.time_mix_v", kVector, {D}, Transform::kOneMinus},
    {Role::kShiftR, "att.time_mix_r", kVector, {D}, Transform::kOneMinus},
    {Role::kFfnShiftK, "ffn.time_mix_k", kVector, {D}, Transform::kOneMinus},
    {Role::kFfnShiftR, "ffn.time_mix_r", kVector, {D}, Transform::kOneMinus},
};
constexpr ModelTensor kTimeMixGate[] = {{Role::kShiftG, "att.time_mix_g", kVector, {D}, Transform::kOneMinus}};

constexpr ModelTensor kChannelDecay[] = {
    // RWKV-4: the logarithm of the decay
    {Role::kDecay, "att.time_decay", kVector, {A}, Transform::kMinusExp},
    {Role::kBonus, "att.time_first", kVector, {A}},
};
constexpr ModelTensor kHeadDecay[] = {
    // RWKV-5.0 and 5.1
    {Role::kDecay, "att.time_decay", Kind::kHeadVector, {H}, Transform::kExpMinusExp},
    {Role::kBonus, "att.time_first", Kind::kHeadVector, {H}, Transform::kExp},
    {Role::kBonus, "att.time_faaaa", Kind::kHeadVector, {H}},
};
constexpr ModelTensor kHeadChannelDecay[] = {
    // RWKV-5.2
    {Role::kDecay, "att.time_decay", kVector, {H, N}, Transform::kExpMinusExp},
    {Role::kBonus, "att.time_faaaa", kVector, {H, N}},
};

constexpr Size kMixRank = Size::kMixRank;
constexpr Size kDecayRank = Size::kDecayRank;
constexpr ModelTensor kRwkv6[] = {
    {Role::kBonus, "att.time_faaaa", kVector, {H, N}},
    {Role::kShiftX, "att.time_maa_x", kVector, {D}},
    {Role::kShiftW, "att.time_maa_w", kVector, {D}},
    {Role::kShiftK, "att.time_maa_k", kVector, {D}},
    {Role::kShiftV, "att.time_maa_v", kVector, {D}},
    {Role::kShiftR, "att.time_maa_r", kVector, {D}},
    {Role::kShiftG, "att.time_maa_g", kVector, {D}},
    {Role::kShiftUp, "att.time_maa_w2", Kind::kLowRankStack, {Size::kFive, kMixRank, D}},
    {Role::kShiftDown, "att.time_maa_w1", kLowRank, {D, Size::kFiveMixRanks}},
    {Role::kDecay, "att.time_decay", kVector, {A}},
    {Role::kDecayDown, "att.time_decay_w1", kLowRank, {D, kDecayRank}},
    {Role::kDecayUp, "att.time_decay_w2", kLowRank, {kDecayRank, A}},
    {Role::kFfnShiftK, "ffn.time_maa_k", kVector, {D}},
    {Role::kFfnShiftR, "ffn.time_maa_r", kVector, {D}},
};

constexpr Size kIclrRank = Size::kIclrRank;
constexpr Size kValueResidualRank = Size::kValueResidualRank;
constexpr Size kGateRank = Size::kGateRank;
constexpr ModelTensor kRwkv7[] = {
    {Role::kBonus, "att.r_k", kVector, {H, N}},
    {Role::kShiftR, "att.x_r", kVector, {D}},
    {Role::kShiftW, "att.x_w", kVector, {D}},
    {Role::kShiftK, "att.x_k", kVector, {D}},
    {Role::kShiftV, "att.x_v", kVector, {D}},
    {Role::kShiftA, "att.x_a", kVector, {D}},
    {Role::kShiftG, "att.x_g", kVector, {D}},
    {Role::kDecay, "att.w0", kVector, {A}},
    {Role::kDecayDown, "att.w1", kLowRank, {D, kDecayRank}},
    {Role::kDecayUp, "att.w2", kLowRank, {kDecayRank, A}},
    {Role::kIclr, "att.a0", kVector, {A}},
    {Role::kIclrDown, "att.a1", kLowRank, {D, kIclrRank}},
    {Role::kIclrUp, "att.a2", kLowRank, {kIclrRank, A}},
    {Role::kValueResidual, "att.v0", kVector, {A}, Transform::kNone, kNotInLayer0},
    {Role::kValueResidualDown, "att.v1", kLowRank, {D, kValueResidualRank}, Transform::kNone, kNotInLayer0},
    {Role::kValueResidualUp, "att.v2", kLowRank, {kValueResidualRank, A}, Transform::kNone, kNotInLayer0},
    {Role::kGateDown, "att.g1", kLowRank, {D, kGateRank}},
    {Role::kGateUp, "att.g2", kLowRank, {kGateRank, A}},
    {Role::kKeyScale, "att.k_k", kVector, {A}},
    {Role::kKeyIclrScale, "att.k_a", kVector, {A}},
    {Role::kFfnShiftK, "ffn.x_k", kVector, {D}},
};

constexpr Size kDeepEmbedWidth = Size::kDeepEmbedWidth;
constexpr ModelTensor kDeepEmbed[] = {
    {Role::kDeepEmbedDown, "ffn.s1", kLowRank, {D, kDeepEmbedWidth}},
    {Role::kDeepEmbedUp, "ffn.s2", kLowRank, {kDeepEmbedWidth, F}},
    {Role::kDeepEmbedBias, "ffn.s0", kVector, {F}},
    {Role::kDeepEmbedTable, "ffn.s_emb.weight", kMatrix, {V, Size::kDeepEmbedTable}},
    {Role::kDeepEmbedMap, "ffn.s_emb_x.weight", kMatrix, {Size::kDeepEmbedTable, D}},
};

constexpr Size Q = Size::kQueryWidth;
constexpr Size kCacheWidth = Size::kCacheWidth;
constexpr ModelTensor kDeepEmbedAttention[] = {
    {Role::kQuery, "qkv.qq.weight", kMatrix, {Q, D}},
    {Role::kCacheKeyDown, "qkv.k1", kLowRank, {D, kCacheWidth}},
    {Role::kCacheKeyUp, "qkv.k2", kLowRank, {kCacheWidth, Q}},
    {Role::kCacheValueDown, "qkv.v1", kLowRank, {D, kCacheWidth}},
    {Role::kCacheValueUp, "qkv.v2", kLowRank, {kCacheWidth, D}},
    {Role::kKeyTable, "qkv.k_emb.weight", kMatrix, {V, Q}},
    {Role::kKeyMap, "qkv.k_emb_x.weight", kMatrix, {Q, D}},
    {Role::kValueTable, "qkv.v_emb.weight", kMatrix, {V, D}},
    {Role::kValueMap, "qkv.v_emb_x.weight", kMatrix, {D, D}},
    {Role::kQueryShift, "qkv.x_q", kVector, {Q}},
    {Role::kKeyShift, "qkv.x_k", kVector, {Q}},
    {Role::kValueShift, "qkv.x_v", kVector, {D}},
    {Role::kLnQuery, "qkv.lnq", kNorm, {Q}},
    {Role::kLnKey, "qkv.lnk", kNorm, {Q}},
    {Role::kLnValue, "qkv.lnv", kNorm, {D}},
};

using Table = std::vector<ModelTensor>;

Table Join(std::initializer_list<absl::Span<const ModelTensor>> parts) {
  Table table;
  for (absl::Span<const ModelTensor> part : parts) table.insert(table.end(), part.begin(), part.end());
  return table;
}

}  // namespace

absl::Span<const ModelTensor> LayerTensors(ModelVersion version) {
  static const Table* const k4 = new Table(Join({kBlock, kFfnReceptance, kTimeMix, kChannelDecay}));
  static const Table* const k5_0 =
      new Table(Join({kBlock, kFfnReceptance, kTimeMix, kHeadDecay, kGroupNorm, kTunedState}));
  static const Table* const k5_1 =
      new Table(Join({kBlock, kFfnReceptance, kTimeMix, kHeadDecay, kGroupNorm, kTimeMixGate, kGate, kTunedState}));
  static const Table* const k5_2 = new Table(
      Join({kBlock, kFfnReceptance, kTimeMix, kHeadChannelDecay, kGroupNorm, kTimeMixGate, kGate, kTunedState}));
  static const Table* const k6 = new Table(Join({kBlock, kFfnReceptance, kRwkv6, kGroupNorm, kGate, kTunedState}));
  static const Table* const k7 = new Table(Join({kBlock, kRwkv7, kGroupNorm, kTunedState}));
  static const Table* const k7a = new Table(Join({*k7, kDeepEmbed}));
  static const Table* const k7b = new Table(Join({*k7a, kDeepEmbedAttention}));
  switch (version) {
    case ModelVersion::k4:
      return *k4;
    case ModelVersion::k5_0:
      return *k5_0;
    case ModelVersion::k5_1:
      return *k5_1;
    case ModelVersion::k5_2:
      return *k5_2;
    case ModelVersion::k6:
      return *k6;
    case ModelVersion::k7:
      return *k7;
    case ModelVersion::k7a:
      return *k7a;
    case ModelVersion::k7b:
      return *k7b;
  }
  return {};
}

absl::Span<const ModelTensor> ModelTensors() { return kModel; }

absl::string_view Name(ModelVersion version) {
  constexpr absl::string_view kNames[] = {"4", "5.0", "5.1", "5.2", "6", "7", "7a", "7b"};
  return kNames[static_cast<int>(version)];
}

absl::string_view Name(Size size) {
  constexpr absl::string_view kNames[] = {"1",
                                          "5",
                                          "width",
                                          "attention width",
                                          "heads",
                                          "head size",
                                          "ffn width",
                                          "vocabulary",
                                          "mix rank",
                                          "5 mix ranks",
                                          "decay rank",
                                          "iclr rank",
                                          "value residual rank",
                                          "gate rank",
                                          "DeepEmbed width",
                                          "DeepEmbed width squared",
                                          "query width",
                                          "cache width"};
  static_assert(sizeof(kNames) / sizeof(kNames[0]) == static_cast<int>(Size::kCount));
  return kNames[static_cast<int>(size)];
}

bool Sizes::Set(Size size, int64_t value) {
  constexpr int64_t kLargest = 1 << 30;
  int64_t& known = values_[static_cast<int>(size)];
  if (known != 0) return known == value;
  if (value < 1 || value > kLargest) return false;
  known = value;
  const int64_t attention_width = (*this)[A];
  const int64_t heads = (*this)[H];
  const int64_t head_size = (*this)[N];
  switch (size) {
    case Size::kAttentionWidth:
    case Size::kHeads:
    case Size::kHeadSize:
      if (heads == 0) return true;
      if (head_size != 0) return Set(A, heads * head_size);
      return attention_width == 0 || (attention_width % heads == 0 && Set(N, attention_width / heads));
    case Size::kMixRank:
      return Set(Size::kFiveMixRanks, 5 * value);
    case Size::kDeepEmbedWidth:
      return Set(Size::kDeepEmbedTable, value * value);
    default:
      return true;
  }
}

void Sizes::ClearRanks() { std::fill(values_.begin() + static_cast<int>(Size::kMixRank), values_.end(), 0); }

int ModelTensor::rank() const {
  return static_cast<int>(std::find(shape.begin(), shape.end(), Size::kNone) - shape.begin());
}

int64_t QuantizationGroup(int64_t cols, int64_t groups) {
  for (int64_t group : {64, 32}) {
    if ((cols + group - 1) / group == groups) return group;
  }
  return 0;
}

}  // namespace rwkv::checkpoint
