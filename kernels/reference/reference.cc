#include "kernels/reference/reference.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels::reference {
namespace {

float Sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }

// (x - mean) / sqrt(var + eps) * weight + bias over `width` channels; y may be x.
void Normalize(const float* x, const float* weight, const float* bias, int64_t width, float epsilon, float* y) {
  float sum = 0.0f;
  for (int64_t c = 0; c < width; ++c) sum += x[c];
  const float mean = sum / static_cast<float>(width);
  float squares = 0.0f;
  for (int64_t c = 0; c < width; ++c) squares += (x[c] - mean) * (x[c] - mean);
  const float deviation = std::sqrt(squares / static_cast<float>(width) + epsilon);
  for (int64_t c = 0; c < width; ++c) y[c] = (x[c] - mean) / deviation * weight[c] + bias[c];
}

}  // namespace

absl::Status Embed(const EmbedArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t width = args.embedding.cols;
  for (int64_t row = 0; row < args.rows; ++row) {
    float* x = args.x + row * width;
    for (int64_t c = 0; c < width; ++c) {
      x[c] = LoadAsFloat(args.embedding.dtype, args.embedding.data, args.tokens[row] * width + c);
    }
    if (args.weight != nullptr) Normalize(x, args.weight, args.bias, width, args.epsilon, x);
  }
  return absl::OkStatus();
}

absl::Status LayerNorm(const LayerNormArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t row = 0; row < args.rows; ++row) {
    Normalize(args.x + row * args.width, args.weight, args.bias, args.width, args.epsilon, args.y + row * args.width);
  }
  return absl::OkStatus();
}

absl::Status TokenShift(const TokenShiftArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    float* state = args.state_pool + span.slot * args.state_stride;
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      const float* x = args.x + row * args.width;
      for (int64_t c = 0; c < args.width; ++c) {
        for (int64_t m = 0; m < args.outputs; ++m) {
          args.y[m][row * args.width + c] = x[c] + (state[c] - x[c]) * args.mix[m][c];
        }
        state[c] = x[c];
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Matmul(const MatmulArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t in = args.weight.cols;
  const int64_t out = args.weight.rows;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t o = 0; o < out; ++o) {
      float z = 0.0f;
      for (int64_t k = 0; k < in; ++k) {
        z += args.x[row * in + k] * LoadAsFloat(args.weight.dtype, args.weight.data, o * in + k);
      }
      switch (args.activation) {
        case Activation::kNone:
          break;
        case Activation::kSigmoid:
          z = Sigmoid(z);
          break;
        case Activation::kTanh:
          z = std::tanh(z);
          break;
        case Activation::kSquaredRelu:
          z = z > 0.0f || std::isnan(z) ? z * z : 0.0f;
          break;
      }
      float& y = args.y[row * out + o];
      y = args.accumulate ? y + z : z;
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv7Prepare(const Wkv7PrepareArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  const int64_t width = args.heads * n;
  constexpr float kInverseSqrtE = 0.60653066f;  // e^(-1/2)
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      float squares = 0.0f;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t c = head * n + j;
        const float kappa = args.k[row * width + c] * args.k_k[c];
        squares += kappa * kappa;
      }
      const float norm = std::max(std::sqrt(squares), 1e-12f);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t c = head * n + j;
        const int64_t at = row * width + c;
        const float decay = std::exp(-kInverseSqrtE * Sigmoid(args.decay_bias[c] + args.decay_lora[at]));
        const float iclr = Sigmoid(args.iclr_bias[c] + args.iclr_lora[at]);
        const float kappa_hat = args.k[at] * args.k_k[c] / norm;
        if (args.v_first != nullptr) {
          const float gate = Sigmoid(args.value_gate_bias[c] + args.value_gate_lora[at]);
          args.v[at] = args.v[at] + (args.v_first[at] - args.v[at]) * gate;
        }
        args.k[at] = args.k[at] * (1.0f + (iclr - 1.0f) * args.k_a[c]);
        args.w[at] = decay;
        args.a[at] = -kappa_hat;
        args.b[at] = kappa_hat * iclr;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv7(const Wkv7Args& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t at = (row * args.heads + head) * n;
        float* state = args.state_pool + span.slot * args.state_stride + head * n * n;
        for (int64_t i = 0; i < n; ++i) {
          float* state_row = state + i * n;
          float recall = 0.0f;
          for (int64_t j = 0; j < n; ++j) recall += state_row[j] * args.a[at + j];
          float read = 0.0f;
          for (int64_t j = 0; j < n; ++j) {
            state_row[j] = state_row[j] * args.w[at + j] + args.v[at + i] * args.k[at + j] + recall * args.b[at + j];
            read += state_row[j] * args.r[at + j];
          }
          args.y[at + i] = read;
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv7Output(const Wkv7OutputArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t at = (row * args.heads + head) * n;
      const int64_t c = head * n;
      Normalize(args.y + at, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, args.out + at);
      float bonus = 0.0f;
      for (int64_t j = 0; j < n; ++j) bonus += args.r[at + j] * args.k[at + j] * args.bonus[c + j];
      for (int64_t j = 0; j < n; ++j) args.out[at + j] = (args.out[at + j] + bonus * args.v[at + j]) * args.g[at + j];
    }
  }
  return absl::OkStatus();
}

const OpTable& Table() {
  static constexpr OpTable kTable = {"reference", "reference", Embed, LayerNorm, TokenShift,
                                     Matmul,      Wkv7Prepare, Wkv7,  Wkv7Output};
  return kTable;
}

}  // namespace rwkv::kernels::reference
