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
  }
  return z;
}

// What a tile needs beside its place: how far rows are apart, what happens to the sums.
struct TileContext {
  int64_t inputs;         // length of the sum
  int64_t x_stride;       // floats from one row of x to the next
  int64_t weight_stride;  // elements from one output's weights to the next output's of the tile
  int64_t y_stride;       // floats from one row of y to the next
  int64_t y_step;         // floats from one output of the tile to the next
  Activation activation;
  bool accumulate;
};

template <typename Weights, int kRows, int kOutputs>
__attribute__((noinline)) void ComputeTile(const TileContext& context, const float* x,
                                           const typename Weights::Element* weight, float* y) {
  constexpr int kCells = kRows * kOutputs;
  F32 sums[kCells] = {};
  const int64_t inputs = context.inputs;
  const int64_t x_stride = context.x_stride;
  const int64_t weight_stride = context.weight_stride;
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    F32 w[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) w[o] = Weights::Load(weight + o * weight_stride + k);
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const F32 row = Load(x + r * x_stride + k);
#pragma clang loop unroll(full)
      for (int o = 0; o < kOutputs; ++o) sums[r * kOutputs + o] = Fma(row, w[o], sums[r * kOutputs + o]);
    }
  }
  if (k < inputs) {
    F32 w[kOutputs];
#pragma clang loop unroll(full)
    for (int o = 0; o < kOutputs; ++o) w[o] = Weights::LoadTail(weight + o * weight_stride + k, inputs - k);
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; ++r) {
      const F32 row = LoadTail(x + r * x_stride + k, inputs - k);
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
  if (context.activation != Activation::kNone) {
    for (int cell = 0; cell < kCells; cell += kLanes) Store(z + cell, Activate(context.activation, Load(z + cell)));
  }
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOutputs; ++o) {
      float* const to = y + r * context.y_stride + o * context.y_step;
      *to = context.accumulate ? *to + z[r * kOutputs + o] : z[r * kOutputs + o];
    }
  }
}

// `rows` <= kTileRows, which is known only now, times kOutputs.
template <typename Weights, int kOutputs, int kRows = kTileRows>
RWKV_INLINE void ComputeTileOfRows(const TileContext& context, int64_t rows, const float* x,
                                   const typename Weights::Element* weight, float* y) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return ComputeTileOfRows<Weights, kOutputs, kRows - 1>(context, rows, x, weight, y);
  }
  ComputeTile<Weights, kRows, kOutputs>(context, x, weight, y);
}

// One tile of rows, weights widened as they are read, each once. The outputs of a tile are a kStep-th of the matrix
// apart.
template <typename Weights>
void MatmulFewRows(const MatmulArgs& args) {
  const int64_t inputs = args.weight.cols;
  const int64_t outputs = args.weight.rows;
  const auto* weight = static_cast<const typename Weights::Element*>(args.weight.data);
  const int64_t streams = args.rows == 1 ? kStreams : kTileOutputs;
  const int64_t step = outputs / streams;
  TileContext context = {inputs, inputs, step * inputs, outputs, step, args.activation, args.accumulate};
  for (int64_t o = 0; o < step; ++o) {
    if (args.rows == 1) {
      ComputeTile<Weights, 1, kStreams>(context, args.x, weight + o * inputs, args.y + o);
    } else {
      ComputeTileOfRows<Weights, kTileOutputs>(context, args.rows, args.x, weight + o * inputs, args.y + o);
    }
  }
  for (int64_t o = step * streams; o < outputs; ++o) {
    ComputeTileOfRows<Weights, 1>(context, args.rows, args.x, weight + o * inputs, args.y + o);
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
  const auto* weight = static_cast<const typename Weights::Element*>(args.weight.data);
  const TileContext context = {inputs, inputs, panel_stride, outputs, 1, args.activation, args.accumulate};
  for (int64_t begin = 0; begin < outputs; begin += panel_outputs) {
    const int64_t count = outputs - begin < panel_outputs ? outputs - begin : panel_outputs;
    for (int64_t o = 0; o < count; ++o) {
      const typename Weights::Element* from = weight + (begin + o) * inputs;
      float* const to = panel + o * panel_stride;
      int64_t k = 0;
      for (; k + kLanes <= inputs; k += kLanes) Store(to + k, Weights::Load(from + k));
      if (k < inputs) Store(to + k, Weights::LoadTail(from + k, inputs - k));
    }
    for (int64_t row = 0; row < args.rows; row += kTileRows) {
      const int64_t rows = args.rows - row < kTileRows ? args.rows - row : kTileRows;
      const float* x = args.x + row * inputs;
      float* const y = args.y + row * outputs + begin;
      int64_t o = 0;
      for (; o + kTileOutputs <= count; o += kTileOutputs) {
        ComputeTileOfRows<Float32Weights, kTileOutputs>(context, rows, x, panel + o * panel_stride, y + o);
      }
      for (; o < count; ++o) ComputeTileOfRows<Float32Weights, 1>(context, rows, x, panel + o * panel_stride, y + o);
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
  switch (args.weight.dtype) {
    case DType::kFloat32:
      return MatmulOf<Float32Weights>(args, workspace);
    case DType::kBFloat16:
      return MatmulOf<BFloat16Weights>(args, workspace);
    case DType::kFloat16:
      return MatmulOf<Float16Weights>(args, workspace);
  }
}

// --- Norms, token shift, embedding ---

// (x - mean) / sqrt(var + eps) * weight + bias over `width` channels; y may be x.
RWKV_INLINE void Normalize(const float* x, const float* weight, const float* bias, int64_t width, float epsilon,
                           float* y) {
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
    StoreSome(y + c, Fma(normal, LoadSome(weight + c, left), LoadSome(bias + c, left)), left);
  }
}

void LayerNorm(const LayerNormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    Normalize(args.x + row * args.width, args.weight, args.bias, args.width, args.epsilon, args.y + row * args.width);
  }
}

template <typename Weights>
void EmbedOf(const EmbedArgs& args) {
  const int64_t width = args.embedding.cols;
  for (int64_t row = 0; row < args.rows; ++row) {
    const auto* from = static_cast<const typename Weights::Element*>(args.embedding.data) + args.tokens[row] * width;
    float* const x = args.x + row * width;
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) Store(x + c, Weights::Load(from + c));
    if (c < width) StoreTail(x + c, Weights::LoadTail(from + c, width - c), width - c);
    if (args.weight != nullptr) Normalize(x, args.weight, args.bias, width, args.epsilon, x);
  }
}

void Embed(const EmbedArgs& args) {
  switch (args.embedding.dtype) {
    case DType::kFloat32:
      return EmbedOf<Float32Weights>(args);
    case DType::kBFloat16:
      return EmbedOf<BFloat16Weights>(args);
    case DType::kFloat16:
      return EmbedOf<Float16Weights>(args);
  }
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
          StoreSome(args.y[m] + row * width + c, Fma(difference, LoadSome(args.mix[m] + c, left), x), left);
        }
      }
      previous_row = x_row;
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      StoreSome(state + c, LoadSome(previous_row + c, width - c), width - c);
    }
  }
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
    for (int64_t head = 0; head < args.heads;
         ++head) {  // A head's state stays in the first-level cache for all tokens.
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
      Normalize(args.y + at, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, args.out + at);
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

// --- Functions, for their tests ---

template <F32 (*kFunction)(F32)>
void Map(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kLanes) StoreSome(y + i, kFunction(LoadSome(x + i, count - i)), count - i);
}

}  // namespace

const KernelSet RWKV_KERNEL_SET = {
    Embed, LayerNorm,  TokenShift, MatmulWorkspaceBytes, Matmul,    Wkv7Prepare,
    Wkv7,  Wkv7Output, Map<Exp>,   Map<Sigmoid>,         Map<Tanh>,
};

}  // namespace rwkv::kernels::cpu
