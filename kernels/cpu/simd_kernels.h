// The operations on vectors of 16 floats, compiled once by each kernels_*.cc, which names its KernelSet in
// RWKV_KERNEL_SET. Law N1 holds because every element is computed in an order that its own row's length alone decides:
// sums run in steps of 16 lanes from the first element on, one accumulator for each, the tail filled up with zeros,
// then the tree of Sum(). Tiles and blocks choose which elements are computed side by side, never how one is computed.
#pragma once

#include "kernels/cpu/kernel_set.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/simd_math.h"

namespace rwkv::kernels::cpu {
namespace {

// --- Matmul ---

// Tiles of rows times outputs, as many accumulators as the registers hold. With one row the weights are read once, from
// memory: kStreams rows of them at a time, far apart, because a core reads several sequential streams faster than one.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileOutputs = 4;
constexpr int kStreams = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 3;
constexpr int kTileOutputs = 2;
constexpr int kStreams = 4;
#else
constexpr int kTileRows = 2;
constexpr int kTileOutputs = 1;
constexpr int kStreams = 2;
#endif

// Floats of widened weights that are kept in the second-level cache while all rows pass by.
constexpr int64_t kPanelFloats = 64 * 1024;

constexpr int64_t RoundUpToLanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <typename Visit>
RWKV_INLINE void VisitBlocks(BlockType blocks, Visit visit) {
  switch (blocks) {
    case BlockType::kNone:
      return;
    case BlockType::kQ4_0:
      return visit(GgmlWeights<SmallBlock<false, false>>());
    case BlockType::kQ4_1:
      return visit(GgmlWeights<SmallBlock<true, false>>());
    case BlockType::kQ5_0:
      return visit(GgmlWeights<SmallBlock<false, true>>());
    case BlockType::kQ5_1:
      return visit(GgmlWeights<SmallBlock<true, true>>());
    case BlockType::kQ8_0:
      return visit(GgmlWeights<EightBitBlock>());
    case BlockType::kQ4_K:
      return visit(GgmlWeights<LargeBlock<false>>());
    case BlockType::kQ5_K:
      return visit(GgmlWeights<LargeBlock<true>>());
    case BlockType::kQ6_K:
      return visit(GgmlWeights<SixBitBlock>());
  }
}

// Calls visit(Weights()) with how the matrix stores its weights.
template <typename Visit>
RWKV_INLINE void VisitWeights(const MatrixView& matrix, Visit visit) {
  switch (matrix.quantization) {
    case Quantization::kNone:
      break;
    case Quantization::kInt8:
      return visit(Int8Weights());
    case Quantization::kInt4:
      return visit(Int4Weights());
    case Quantization::kBlocks:
      return VisitBlocks(matrix.blocks, visit);
  }
  switch (matrix.dtype) {
    case DType::kFloat32:
      return visit(Float32Weights());
    case DType::kBFloat16:
      return visit(BFloat16Weights());
    case DType::kFloat16:
      return visit(Float16Weights());
  }
}

// At most 16 of the `left` weights from `col`, a multiple of 16; the lanes behind them are zero.
template <typename Weights>
RWKV_INLINE F32 LoadSomeWeights(typename Weights::Row row, int64_t col, int64_t left) {
  const typename Weights::Group group = Weights::GroupOf(row, col);
  return left >= kLanes ? Weights::Load(row, group, col) : Weights::LoadTail(row, group, col, left);
}

// Row `row` of the matrix as floats.
template <typename Weights>
RWKV_INLINE void WidenRow(const MatrixView& matrix, int64_t row, float* to) {
  const typename Weights::Row weights = Weights::RowOf(matrix, row);
  for (int64_t k = 0; k < matrix.cols; k += kLanes) {
    StoreSome(to + k, LoadSomeWeights<Weights>(weights, k, matrix.cols - k), matrix.cols - k);
  }
}

RWKV_INLINE F32 Activate(Activation activation, F32 z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return Tanh(z);
    case Activation::kSquaredRelu: {
      const F32 positive = Select(z < F32{}, F32{}, z);  // NaN stays
      return positive * positive;
    }
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kDecay:
      return Exp(-Exp(z));
  }
  return z;
}

// A tile's place: its first row and output, how far its outputs are apart, and where the weights of those are, which is
// the matrix itself or a panel of it.
struct Tile {
  int64_t row;
  int64_t output;
  int64_t output_step;
  const MatrixView& weight;
  int64_t weight_row;  // of the first output
};

template <typename Weights, int kRows, int kOutputs>
__attribute__((noinline)) void ComputeTile(const MatmulArgs& args, const Tile& tile) {
  constexpr int kCells = kRows * kOutputs;
  F32 sums[kCells] = {};
  const int64_t inputs = args.weight.cols;
  const float* const x = args.x + tile.row * inputs;
  typename Weights::Row weight[kOutputs];
#pragma clang loop unroll(full)
  for (int o = 0; o < kOutputs; ++o) weight[o] = Weights::RowOf(tile.weight, tile.weight_row + o * tile.output_step);
  int64_t k = 0;
  for (; k + Weights::kStep <= inputs; k += Weights::kStep) {
    typename Weights::Group group[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) group[o] = Weights::GroupOf(weight[o], k);
#pragma clang loop unroll(full)
    for (int64_t lane = 0; lane < Weights::kStep; lane += kLanes) {
      F32 w[kOutputs];
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) w[o] = Weights::Load(weight[o], group[o], k + lane);
#pragma clang loop unroll(full)
      for (int r = 0; r < kRows; ++r) {
        const F32 row = Load(x + r * inputs + k + lane);
#pragma clang loop unroll(full)
        for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
      }
    }
  }
  for (; k < inputs; k += kLanes) {  // What is left of a step, 16 at a time.
    F32 w[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) w[o] = LoadSomeWeights<Weights>(weight[o], k, inputs - k);
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const F32 row = LoadSome(x + r * inputs + k, inputs - k);
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
    }
  }

  alignas(64) float z[RoundUpToLanes(kCells)] = {};
#pragma clang loop unroll(full)
  for (int cell = 0; cell + 4 <= kCells; cell += 4) {
    const F32x4 four = Sum4(sums[cell], sums[cell + 1], sums[cell + 2], sums[cell + 3]);
    for (int i = 0; i < 4; ++i) z[cell + i] = four[i];
  }
#pragma clang loop unroll(full)
  for (int cell = kCells / 4 * 4; cell < kCells; ++cell) z[cell] = Sum(sums[cell]);
  if (args.bias != nullptr) {
    for (int cell = 0; cell < kCells; ++cell) {
      z[cell] += args.bias[tile.output + cell % kOutputs * tile.output_step];
    }
  }
  if (args.activation != Activation::kNone) {
    for (int cell = 0; cell < kCells; cell += kLanes) Store(z + cell, Activate(args.activation, Load(z + cell)));
  }
  for (int cell = 0; cell < kCells; ++cell) {
    const int64_t at =
        (tile.row + cell / kOutputs) * args.weight.rows + tile.output + cell % kOutputs * tile.output_step;
    const float value = args.gate != nullptr ? z[cell] * args.gate[at] : z[cell];
    args.y[at] = args.accumulate ? args.y[at] + value : value;
  }
}

// `rows` <= kTileRows, which is known only now, times kOutputs.
template <typename Weights, int kOutputs, int kRows = kTileRows>
RWKV_INLINE void ComputeTileOfRows(const MatmulArgs& args, int64_t rows, const Tile& tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return ComputeTileOfRows<Weights, kOutputs, kRows - 1>(args, rows, tile);
  }
  ComputeTile<Weights, kRows, kOutputs>(args, tile);
}

// One tile of rows, weights widened as they are read, each once. The outputs of a tile are a kStep-th of the matrix
// apart.
template <typename Weights>
void MatmulFewRows(const MatmulArgs& args) {
  const int64_t outputs = args.weight.rows;
  const int64_t streams = args.rows == 1 ? kStreams : kTileOutputs;
  const int64_t step = outputs / streams;
  for (int64_t o = 0; o < step; ++o) {
    const Tile tile = {0, o, step, args.weight, o};
    if (args.rows == 1) {
      ComputeTile<Weights, 1, kStreams>(args, tile);
    } else {
      ComputeTileOfRows<Weights, kTileOutputs>(args, args.rows, tile);
    }
  }
  for (int64_t o = step * streams; o < outputs; ++o) {
    ComputeTileOfRows<Weights, 1>(args, args.rows, {0, o, 1, args.weight, o});
  }
}

// Outputs whose widened weights fit the panel, at least one tile of them.
RWKV_INLINE int64_t PanelOutputs(int64_t inputs) {
  const int64_t outputs = kPanelFloats / RoundUpToLanes(inputs) / kTileOutputs * kTileOutputs;
  return outputs < kTileOutputs ? kTileOutputs : outputs;
}

// All rows past one panel of outputs after another.
template <typename Weights>
void MatmulManyRows(const MatmulArgs& args, float* panel) {
  const int64_t inputs = args.weight.cols;
  const int64_t outputs = args.weight.rows;
  const int64_t panel_stride = RoundUpToLanes(inputs);
  const int64_t panel_outputs = PanelOutputs(inputs);
  MatrixView widened;
  widened.rows = panel_outputs;
  widened.cols = panel_stride;
  widened.data = panel;
  for (int64_t begin = 0; begin < outputs; begin += panel_outputs) {
    const int64_t count = outputs - begin < panel_outputs ? outputs - begin : panel_outputs;
    for (int64_t o = 0; o < count; ++o) WidenRow<Weights>(args.weight, begin + o, panel + o * panel_stride);
    for (int64_t row = 0; row < args.rows; row += kTileRows) {
      const int64_t rows = args.rows - row < kTileRows ? args.rows - row : kTileRows;
      int64_t o = 0;
      for (; o + kTileOutputs <= count; o += kTileOutputs) {
        ComputeTileOfRows<Float32Weights, kTileOutputs>(args, rows, {row, begin + o, 1, widened, o});
      }
      for (; o < count; ++o) ComputeTileOfRows<Float32Weights, 1>(args, rows, {row, begin + o, 1, widened, o});
    }
  }
}

int64_t MatmulWorkspaceBytes(const MatmulArgs& args) {
  if (args.rows <= kTileRows) return 0;
  return PanelOutputs(args.weight.cols) * RoundUpToLanes(args.weight.cols) * static_cast<int64_t>(sizeof(float));
}

template <typename Weights>
void MatmulOf(const MatmulArgs& args, void* workspace) {
  if (args.rows <= kTileRows) {
    MatmulFewRows<Weights>(args);
  } else {
    MatmulManyRows<Weights>(args, static_cast<float*>(workspace));
  }
}

void Matmul(const MatmulArgs& args, void* workspace) {
  VisitWeights(args.weight, [&](auto weights) { MatmulOf<decltype(weights)>(args, workspace); });
}

// --- Norms, token shift, embedding ---

// (x - mean) / sqrt(var + eps) * weight + bias over `width` channels, and times the gate if there is one; y may be x or
// gate.
RWKV_INLINE void Normalize(const float* x, const float* weight, const float* bias, int64_t width, float epsilon,
                           const float* gate, float* y) {
  F32 sum = {};
  for (int64_t c = 0; c < width; c += kLanes) sum += LoadSome(x + c, width - c);
  const F32 mean = Broadcast(Sum(sum) / static_cast<float>(width));
  F32 squares = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const F32 distance = KeepFirst(LoadSome(x + c, width - c) - mean, width - c);
    squares = Fma(distance, distance, squares);
  }
  const F32 scale = Broadcast(1.0f / __builtin_sqrtf(Sum(squares) / static_cast<float>(width) + epsilon));
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t left = width - c;
    const F32 normal = (LoadSome(x + c, left) - mean) * scale;
    F32 z = Fma(normal, LoadSome(weight + c, left), LoadSome(bias + c, left));
    if (gate != nullptr) z = z * LoadSome(gate + c, left);
    StoreSome(y + c, z, left);
  }
}

void LayerNorm(const LayerNormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    Normalize(args.x + row * args.width, args.weight, args.bias, args.width, args.epsilon, nullptr,
              args.y + row * args.width);
  }
}

void GroupNorm(const GroupNormArgs& args) {
  const int64_t n = args.head_size;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t c = head * n;
      const int64_t at = row * args.heads * n + c;
      Normalize(args.y + at, args.weight + c, args.bias + c, n, args.epsilon,
                args.gate != nullptr ? args.gate + at : nullptr, args.out + at);
    }
  }
}

void Embed(const EmbedArgs& args) {
  const int64_t width = args.embedding.cols;
  VisitWeights(args.embedding, [&](auto weights) {
    for (int64_t row = 0; row < args.rows; ++row) {
      float* const x = args.x + row * width;
      WidenRow<decltype(weights)>(args.embedding, args.tokens[row], x);
      if (args.weight != nullptr) Normalize(x, args.weight, args.bias, width, args.epsilon, nullptr, x);
    }
  });
}

void TokenShift(const TokenShiftArgs& args) {
  const int64_t width = args.width;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    float* const state = args.state_pool + span.slot * args.state_stride;
    const float* previous_row = state;
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      const float* x_row = args.x + row * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t left = width - c;
        const F32 x = LoadSome(x_row + c, left);
        const F32 difference = LoadSome(previous_row + c, left) - x;
        for (int64_t m = 0; m < args.outputs; ++m) {
          F32 mix = LoadSome(args.mix[m] + c, left);
          if (args.mix_delta[m] != nullptr) mix += LoadSome(args.mix_delta[m] + row * width + c, left);
          StoreSome(args.y[m] + row * width + c, Fma(difference, mix, x), left);
        }
      }
      previous_row = x_row;
    }
    if (args.keep_state) continue;
    for (int64_t c = 0; c < width; c += kLanes) {
      StoreSome(state + c, LoadSome(previous_row + c, width - c), width - c);
    }
  }
}

// --- RWKV-4 time mix ---

// Of exp(a - max(a, b)) and exp(b - max(a, b)) one is 1, and one exp() makes the other.
struct Scales {
  F32 a;
  F32 b;
};
RWKV_INLINE Scales ScalesOf(F32 a, F32 b) {
  const F32 smaller = Exp(-Abs(a - b));
  const I32 a_is_larger = a > b;
  return {Select(a_is_larger, Broadcast(1.0f), smaller), Select(a_is_larger, smaller, Broadcast(1.0f))};
}

void Wkv4(const Wkv4Args& args) {
  const int64_t width = args.width;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    for (int64_t c = 0; c < width; c += kLanes) {  // The states of 16 channels stay in registers for all tokens.
      const int64_t left = width - c;
      float* const aa_state = args.aa.data + span.slot * args.aa.stride + c;
      float* const bb_state = args.bb.data + span.slot * args.bb.stride + c;
      float* const pp_state = args.pp.data + span.slot * args.pp.stride + c;
      F32 aa = LoadSome(aa_state, left);
      F32 bb = LoadSome(bb_state, left);
      F32 pp = LoadSome(pp_state, left);
      const F32 decay = LoadSome(args.decay + c, left);
      const F32 bonus = LoadSome(args.bonus + c, left);
      for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
        const int64_t at = row * width + c;
        const F32 k = LoadSome(args.k + at, left);
        const F32 v = LoadSome(args.v + at, left);
        const Scales read = ScalesOf(pp, bonus + k);
        const F32 wkv = Fma(read.a, aa, read.b * v) / Fma(read.a, bb, read.b);
        StoreSome(args.y + at, LoadSome(args.r + at, left) * wkv, left);
        const F32 decayed = pp + decay;
        const Scales write = ScalesOf(decayed, k);
        aa = Fma(write.a, aa, write.b * v);
        bb = Fma(write.a, bb, write.b);
        pp = Select(decayed > k, decayed, k);
      }
      StoreSome(aa_state, aa, left);
      StoreSome(bb_state, bb, left);
      StoreSome(pp_state, pp, left);
    }
  }
}

// --- RWKV-5 and 6 time mix ---

// One head's vectors of one token.
struct Wkv6Token {
  const float* r;
  const float* w;
  const float* k;
  const float* v;
  float bonus;  // sum_j r[j] * k[j] * bonus[j]
  float* y;
};

// kRows rows of one head's state for one token. kHeadSize: the head size when it is known at compile time, else 0.
template <int kRows, int64_t kHeadSize>
RWKV_INLINE void Wkv6Rows(const Wkv6Token& token, int64_t head_size, int64_t i, float* state) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : head_size;
  F32 sums[kRows] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 r = LoadSome(token.r + j, n - j);
    const F32 w = LoadSome(token.w + j, n - j);
    const F32 k = LoadSome(token.k + j, n - j);
    for (int q = 0; q < kRows; ++q) {
      const F32 s = LoadSome(state + q * n + j, n - j);
      sums[q] = Fma(s, r, sums[q]);
      StoreSome(state + q * n + j, Fma(Broadcast(token.v[i + q]), k, s * w), n - j);
    }
  }
  for (int q = 0; q < kRows; ++q) token.y[i + q] = Sum(sums[q]) + token.bonus * token.v[i + q];
}

template <int64_t kHeadSize>
void Wkv6Of(const Wkv6Args& args) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : args.head_size;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    for (int64_t head = 0; head < args.heads; ++head) {  // A head's state stays in the first-level cache, as in Wkv7Of.
      const int64_t c = head * n;
      float* const state = args.state_pool + span.slot * args.state_stride + c * n;
      for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
        const int64_t at = row * args.heads * n + c;
        F32 bonus = {};
        for (int64_t j = 0; j < n; j += kLanes) {
          bonus = Fma(LoadSome(args.r + at + j, n - j) * LoadSome(args.k + at + j, n - j),
                      LoadSome(args.bonus + c + j, n - j), bonus);
        }
        const Wkv6Token token = {
            args.r + at, args.w + (args.constant_decay ? c : at), args.k + at, args.v + at, Sum(bonus), args.y + at};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) Wkv6Rows<4, kHeadSize>(token, n, i, state + i * n);
        for (; i < n; ++i) Wkv6Rows<1, kHeadSize>(token, n, i, state + i * n);
      }
    }
  }
}

void Wkv6(const Wkv6Args& args) {
  if (args.head_size == 64) return Wkv6Of<64>(args);
  return Wkv6Of<0>(args);
}

// --- RWKV-7 time mix ---

void Wkv7Prepare(const Wkv7PrepareArgs& args) {
  const int64_t n = args.head_size;
  const int64_t width = args.heads * n;
  constexpr float kInverseSqrtE = 0.60653066f;  // e^(-1/2)
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      F32 squares = {};
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t c = head * n + j;
        const F32 kappa = LoadSome(args.k + row * width + c, n - j) * LoadSome(args.k_k + c, n - j);
        squares = Fma(kappa, kappa, squares);
      }
      const float length = __builtin_sqrtf(Sum(squares));
      const F32 norm = Broadcast(length < 1e-12f ? 1e-12f : length);
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t left = n - j;
        const int64_t c = head * n + j;
        const int64_t at = row * width + c;
        const F32 decay =
            Exp(Sigmoid(LoadSome(args.decay_bias + c, left) + LoadSome(args.decay_lora + at, left)) * -kInverseSqrtE);
        const F32 iclr = Sigmoid(LoadSome(args.iclr_bias + c, left) + LoadSome(args.iclr_lora + at, left));
        const F32 k = LoadSome(args.k + at, left);
        const F32 kappa_hat = k * LoadSome(args.k_k + c, left) / norm;
        if (args.v_first != nullptr) {
          const F32 gate =
              Sigmoid(LoadSome(args.value_gate_bias + c, left) + LoadSome(args.value_gate_lora + at, left));
          const F32 v = LoadSome(args.v + at, left);
          StoreSome(args.v + at, Fma(LoadSome(args.v_first + at, left) - v, gate, v), left);
        }
        StoreSome(args.k + at, k * Fma(iclr - 1.0f, LoadSome(args.k_a + c, left), Broadcast(1.0f)), left);
        StoreSome(args.w + at, decay, left);
        StoreSome(args.a + at, -kappa_hat, left);
        StoreSome(args.b + at, kappa_hat * iclr, left);
      }
    }
  }
}

// One head's vectors of one token.
struct Wkv7Token {
  const float* r;
  const float* w;
  const float* k;
  const float* v;
  const float* a;
  const float* b;
  float* y;
};

// kRows rows of one head's state for one token. kHeadSize: the head size when it is known at compile time, else 0.
template <int kRows, int64_t kHeadSize>
RWKV_INLINE void Wkv7Rows(const Wkv7Token& token, int64_t head_size, int64_t i, float* state) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : head_size;
  F32 sums[kRows] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 a = LoadSome(token.a + j, n - j);
    for (int q = 0; q < kRows; ++q) sums[q] = Fma(LoadSome(state + q * n + j, n - j), a, sums[q]);
  }
  F32 recall[kRows];
  if constexpr (kRows == 4) {
    const F32x4 four = Sum4(sums[0], sums[1], sums[2], sums[3]);
    for (int q = 0; q < kRows; ++q) recall[q] = Broadcast(four[q]);
  } else {
    for (int q = 0; q < kRows; ++q) recall[q] = Broadcast(Sum(sums[q]));
  }
  for (int q = 0; q < kRows; ++q) sums[q] = F32{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32 r = LoadSome(token.r + j, n - j);
    const F32 w = LoadSome(token.w + j, n - j);
    const F32 k = LoadSome(token.k + j, n - j);
    const F32 b = LoadSome(token.b + j, n - j);
    for (int q = 0; q < kRows; ++q) {
      F32 s = LoadSome(state + q * n + j, n - j) * w;
      s = Fma(Broadcast(token.v[i + q]), k, s);
      s = Fma(recall[q], b, s);
      StoreSome(state + q * n + j, s, n - j);
      sums[q] = Fma(s, r, sums[q]);
    }
  }
  if constexpr (kRows == 4) {
    const F32x4 four = Sum4(sums[0], sums[1], sums[2], sums[3]);
    for (int q = 0; q < kRows; ++q) token.y[i + q] = four[q];
  } else {
    for (int q = 0; q < kRows; ++q) token.y[i + q] = Sum(sums[q]);
  }
}

template <int64_t kHeadSize>
void Wkv7Of(const Wkv7Args& args) {
  const int64_t n = kHeadSize != 0 ? kHeadSize : args.head_size;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    // A head's state stays in the first-level cache for all tokens.
    for (int64_t head = 0; head < args.heads; ++head) {
      float* const state = args.state_pool + span.slot * args.state_stride + head * n * n;
      for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
        const int64_t at = (row * args.heads + head) * n;
        const Wkv7Token token = {args.r + at, args.w + at, args.k + at, args.v + at,
                                 args.a + at, args.b + at, args.y + at};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) Wkv7Rows<4, kHeadSize>(token, n, i, state + i * n);
        for (; i < n; ++i) Wkv7Rows<1, kHeadSize>(token, n, i, state + i * n);
      }
    }
  }
}

void Wkv7(const Wkv7Args& args) {
  if (args.head_size == 64) return Wkv7Of<64>(args);
  return Wkv7Of<0>(args);
}

void Wkv7Output(const Wkv7OutputArgs& args) {
  const int64_t n = args.head_size;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t at = (row * args.heads + head) * n;
      const int64_t c = head * n;
      Normalize(args.y + at, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, nullptr, args.out + at);
      F32 sum = {};
      for (int64_t j = 0; j < n; j += kLanes) {
        sum = Fma(LoadSome(args.r + at + j, n - j) * LoadSome(args.k + at + j, n - j),
                  LoadSome(args.bonus + c + j, n - j), sum);
      }
      const F32 bonus = Broadcast(Sum(sum));
      for (int64_t j = 0; j < n; j += kLanes) {
        const F32 z = Fma(bonus, LoadSome(args.v + at + j, n - j), LoadSome(args.out + at + j, n - j));
        StoreSome(args.out + at + j, z * LoadSome(args.g + at + j, n - j), n - j);
      }
    }
  }
}

// --- RWKV-7a and 7b ---

int64_t DeepEmbedWorkspaceBytes(const DeepEmbedArgs& args) {
  return args.table.cols * static_cast<int64_t>(sizeof(float));
}

void DeepEmbed(const DeepEmbedArgs& args, void* workspace) {
  const int64_t n = args.width;
  auto* const matrix = static_cast<float*>(workspace);
  VisitWeights(args.table, [&](auto weights) {
    for (int64_t row = 0; row < args.rows; ++row) {
      WidenRow<decltype(weights)>(args.table, args.tokens[row], matrix);
      for (int64_t j = 0; j < n; j += kLanes) {
        F32 sum = {};
        for (int64_t i = 0; i < n; ++i) {
          sum = Fma(Broadcast(args.x[row * n + i]), LoadSome(matrix + i * n + j, n - j), sum);
        }
        StoreSome(args.y + row * n + j, sum, n - j);
      }
    }
  });
}

// What one sequence's keys, values, query and weights, and one table row take, one after the other; then the workspace
// of the product that expands the caches.
struct AttentionWorkspace {
  float* keys;     // [tokens, Q]
  float* values;   // [tokens, D]
  float* weights;  // [tokens]
  float* row;      // [max(Q, D)]
  void* matmul;
};

RWKV_INLINE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Tokens that a span's sequence has after it.
RWKV_INLINE int64_t TokensAfter(const DeepEmbedAttentionArgs& args, const SequenceSpan& span) {
  return static_cast<int64_t>(args.length.data[span.slot * args.length.stride]) + span.row_count;
}

// The product that expands `tokens` cached rows.
RWKV_INLINE MatmulArgs ExpandArgs(const MatrixView& expand, int64_t tokens, const float* cache, float* y) {
  MatmulArgs args;
  args.rows = tokens;
  args.weight = expand;
  args.x = cache;
  args.y = y;
  return args;
}

RWKV_INLINE int64_t MostTokens(const DeepEmbedAttentionArgs& args) {
  int64_t most = 0;
  for (int64_t s = 0; s < args.span_count; ++s) most = Larger(most, TokensAfter(args, args.spans[s]));
  return most;
}

RWKV_INLINE AttentionWorkspace Divide(const DeepEmbedAttentionArgs& args, int64_t tokens, void* workspace) {
  AttentionWorkspace parts;
  parts.keys = static_cast<float*>(workspace);
  parts.values = parts.keys + RoundUpToLanes(tokens * args.k2.rows);
  parts.weights = parts.values + RoundUpToLanes(tokens * args.v2.rows);
  parts.row = parts.weights + RoundUpToLanes(tokens);
  parts.matmul = parts.row + RoundUpToLanes(Larger(args.k2.rows, args.v2.rows));
  return parts;
}

int64_t DeepEmbedAttentionWorkspaceBytes(const DeepEmbedAttentionArgs& args) {
  const int64_t tokens = MostTokens(args);
  const int64_t floats = RoundUpToLanes(tokens * args.k2.rows) + RoundUpToLanes(tokens * args.v2.rows) +
                         RoundUpToLanes(tokens) + RoundUpToLanes(Larger(args.k2.rows, args.v2.rows));
  return floats * static_cast<int64_t>(sizeof(float)) +
         Larger(MatmulWorkspaceBytes(ExpandArgs(args.k2, tokens, nullptr, nullptr)),
                MatmulWorkspaceBytes(ExpandArgs(args.v2, tokens, nullptr, nullptr)));
}

// rows[t] = LN(mix of rows[t] and rows[t-1]) with rows[t] times the table's row of the token; `row` is scratch memory.
RWKV_INLINE void FinishCachedRows(const MatrixView& table, const float* tokens, int64_t count, const float* mix,
                                  const float* norm_weight, const float* norm_bias, float epsilon, float* row,
                                  float* rows) {
  const int64_t width = table.cols;
  VisitWeights(table, [&](auto weights) {
    for (int64_t t = 0; t < count; ++t) {
      WidenRow<decltype(weights)>(table, static_cast<int64_t>(tokens[t]), row);
      for (int64_t c = 0; c < width; c += kLanes) {
        StoreSome(rows + t * width + c, LoadSome(rows + t * width + c, width - c) * LoadSome(row + c, width - c),
                  width - c);
      }
    }
  });
  for (int64_t t = count - 1; t >= 0; --t) {  // From the end, so that the row before is still what it was.
    float* const now_row = rows + t * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const F32 now = LoadSome(now_row + c, width - c);
      const F32 before = t > 0 ? LoadSome(now_row - width + c, width - c) : F32{};
      StoreSome(now_row + c, Fma(before - now, LoadSome(mix + c, width - c), now), width - c);
    }
    Normalize(now_row, norm_weight, norm_bias, width, epsilon, nullptr, now_row);
  }
}

// One row's query against the keys [count, Q], and the values [count, D] by what comes out, added to y [D].
RWKV_INLINE void Attend(const float* query, int64_t query_width, const AttentionWorkspace& parts, int64_t count,
                        int64_t width, float* y) {
  F32 sum = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    alignas(64) float products[kLanes] = {};
    for (int64_t lane = 0; lane < kLanes && t + lane < count; ++lane) {
      const float* const key = parts.keys + (t + lane) * query_width;
      F32 product = {};
      for (int64_t c = 0; c < query_width; c += kLanes) {
        product = Fma(LoadSome(query + c, query_width - c), LoadSome(key + c, query_width - c), product);
      }
      products[lane] = Sum(product);
    }
    // Scores lie in [-64, 64], so their exp needs no maximum taken off.
    const F32 weights = Exp(Tanh(Load(products) * (1.0f / 1024.0f)) * 64.0f);
    sum += KeepFirst(weights, count - t);
    Store(parts.weights + t, weights);
  }
  const float total = Sum(sum);
  for (int64_t c = 0; c < width; c += kLanes) {
    F32 mean = {};
    for (int64_t t = 0; t < count; ++t) {
      mean = Fma(Broadcast(parts.weights[t]), LoadSome(parts.values + t * width + c, width - c), mean);
    }
    StoreSome(y + c, LoadSome(y + c, width - c) + mean / total, width - c);
  }
}

RWKV_INLINE void CopyFloats(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) StoreSome(to + i, LoadSome(from + i, count - i), count - i);
}

void DeepEmbedAttention(const DeepEmbedAttentionArgs& args, void* workspace) {
  const int64_t query_width = args.k2.rows;
  const int64_t rank = args.k2.cols;
  const int64_t width = args.v2.rows;
  const AttentionWorkspace parts = Divide(args, MostTokens(args), workspace);
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    const int64_t after = TokensAfter(args, span);
    const int64_t before = after - span.row_count;
    float* const tokens = args.token_cache.data + span.slot * args.token_cache.stride;
    float* const key_cache = args.key_cache.data + span.slot * args.key_cache.stride;
    float* const value_cache = args.value_cache.data + span.slot * args.value_cache.stride;
    float* const q_previous = args.q_previous.data + span.slot * args.q_previous.stride;
    for (int64_t t = 0; t < span.row_count; ++t) {
      tokens[before + t] = static_cast<float>(args.tokens[span.row_begin + t]);
    }
    CopyFloats(args.key + span.row_begin * rank, span.row_count * rank, key_cache + before * rank);
    CopyFloats(args.value + span.row_begin * rank, span.row_count * rank, value_cache + before * rank);
    args.length.data[span.slot * args.length.stride] = static_cast<float>(after);

    Matmul(ExpandArgs(args.k2, after, key_cache, parts.keys), parts.matmul);
    FinishCachedRows(args.k_emb, tokens, after, args.x_k, args.lnk_weight, args.lnk_bias, args.epsilon, parts.row,
                     parts.keys);
    MatmulArgs expand_values = ExpandArgs(args.v2, after, value_cache, parts.values);
    expand_values.activation = Activation::kTanh;
    Matmul(expand_values, parts.matmul);
    FinishCachedRows(args.v_emb, tokens, after, args.x_v, args.lnv_weight, args.lnv_bias, args.epsilon, parts.row,
                     parts.values);

    const float* q_before = q_previous;
    for (int64_t t = 0; t < span.row_count; ++t) {
      const float* const q = args.q + (span.row_begin + t) * query_width;
      for (int64_t c = 0; c < query_width; c += kLanes) {
        const int64_t left = query_width - c;
        const F32 now = LoadSome(q + c, left);
        StoreSome(parts.row + c, Fma(LoadSome(q_before + c, left) - now, LoadSome(args.x_q + c, left), now), left);
      }
      Normalize(parts.row, args.lnq_weight, args.lnq_bias, query_width, args.epsilon, nullptr, parts.row);
      Attend(parts.row, query_width, parts, before + t + 1, width, args.y + (span.row_begin + t) * width);
      q_before = q;
    }
    CopyFloats(q_before, query_width, q_previous);
  }
}

// --- Functions, for their tests ---

template <F32 (*kFunction)(F32)>
void Map(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kLanes) StoreSome(y + i, kFunction(LoadSome(x + i, count - i)), count - i);
}

}  // namespace

const KernelSet RWKV_KERNEL_SET = {
    Embed,
    LayerNorm,
    TokenShift,
    MatmulWorkspaceBytes,
    Matmul,
    GroupNorm,
    Wkv4,
    Wkv6,
    Wkv7Prepare,
    Wkv7,
    Wkv7Output,
    DeepEmbedWorkspaceBytes,
    DeepEmbed,
    DeepEmbedAttentionWorkspaceBytes,
    DeepEmbedAttention,
    Map<Exp>,
    Map<Sigmoid>,
    Map<Tanh>,
};

}  // namespace rwkv::kernels::cpu
