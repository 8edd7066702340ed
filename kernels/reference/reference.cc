#include "kernels/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/base/host_device.h"
#include "kernels/base/matrix.h"
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

// The keys or values of the first `count` cached tokens [count, expand.rows]: act(cache expand^T) * table[token], mixed
// with the row before (zeros before the first), normalised.
std::vector<float> RebuiltRows(const float* cache, const MatrixView& expand, bool tanh, const MatrixView& table,
                               const float* tokens, int64_t count, const float* mix, const float* norm_weight,
                               const float* norm_bias, float epsilon) {
  const int64_t width = expand.rows;
  std::vector<float> rows(static_cast<size_t>(count * width));
  std::vector<float> previous(static_cast<size_t>(width));
  for (int64_t t = 0; t < count; ++t) {
    float* row = rows.data() + t * width;
    for (int64_t c = 0; c < width; ++c) {
      float z = 0.0f;
      for (int64_t i = 0; i < expand.cols; ++i) z += cache[t * expand.cols + i] * LoadAsFloat(expand, c, i);
      const float now = (tanh ? std::tanh(z) : z) * LoadAsFloat(table, static_cast<int64_t>(tokens[t]), c);
      row[c] = now + (previous[c] - now) * mix[c];
      previous[c] = now;
    }
    Normalize(row, norm_weight, norm_bias, width, epsilon, row);
  }
  return rows;
}

}  // namespace

absl::Status Embed(const EmbedArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t width = args.embedding.cols;
  for (int64_t row = 0; row < args.rows; ++row) {
    float* x = args.x + row * width;
    for (int64_t c = 0; c < width; ++c) {
      x[c] = LoadAsFloat(args.embedding, args.tokens[row], c);
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
    const float* previous = state;
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      const float* x = args.x + row * args.width;
      for (int64_t c = 0; c < args.width; ++c) {
        const int64_t at = row * args.width + c;
        for (int64_t m = 0; m < args.outputs; ++m) {
          const float delta = args.mix_delta[m] != nullptr ? args.mix_delta[m][at] : 0.0f;
          args.y[m][at] = x[c] + (previous[c] - x[c]) * (args.mix[m][c] + delta);
        }
      }
      previous = x;
    }
    if (!args.keep_state) std::copy(previous, previous + args.width, state);
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
        z += args.x[row * in + k] * LoadAsFloat(args.weight, o, k);
      }
      if (args.bias != nullptr) z += args.bias[o];
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
        case Activation::kSilu:
          z = z * Sigmoid(z);
          break;
        case Activation::kDecay:
          z = std::exp(-std::exp(z));
          break;
      }
      if (args.gate != nullptr) z *= args.gate[row * out + o];
      float& y = args.y[row * out + o];
      y = args.accumulate ? y + z : z;
    }
  }
  return absl::OkStatus();
}

absl::Status Products(const ProductsArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t i = 0; i < args.count; ++i) {
    const Product& product = args.products[i];
    RWKV_RETURN_IF_ERROR(Matmul({args.rows, product.weight->matrix, product.x, product.bias, product.activation,
                                 product.gate, product.accumulate, product.y},
                                stream));
  }
  return absl::OkStatus();
}

absl::Status GroupNorm(const GroupNormArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t c = head * n;
      const int64_t at = row * args.heads * n + c;
      std::vector<float> z(static_cast<size_t>(n));
      Normalize(args.y + at, args.weight + c, args.bias + c, n, args.epsilon, z.data());
      for (int64_t j = 0; j < n; ++j) args.out[at + j] = args.gate != nullptr ? z[j] * args.gate[at + j] : z[j];
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv4(const Wkv4Args& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    float* aa = args.aa.data + span.slot * args.aa.stride;
    float* bb = args.bb.data + span.slot * args.bb.stride;
    float* pp = args.pp.data + span.slot * args.pp.stride;
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      for (int64_t c = 0; c < args.width; ++c) {
        const int64_t at = row * args.width + c;
        const float k = args.k[at];
        const float v = args.v[at];
        float q = std::max(pp[c], args.bonus[c] + k);
        float old_scale = std::exp(pp[c] - q);
        float new_scale = std::exp(args.bonus[c] + k - q);
        const float wkv = (old_scale * aa[c] + new_scale * v) / (old_scale * bb[c] + new_scale);
        args.y[at] = args.r[at] * wkv;
        q = std::max(pp[c] + args.decay[c], k);
        old_scale = std::exp(pp[c] + args.decay[c] - q);
        new_scale = std::exp(k - q);
        aa[c] = old_scale * aa[c] + new_scale * v;
        bb[c] = old_scale * bb[c] + new_scale;
        pp[c] = q;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv6(const Wkv6Args& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t c = head * n;
        const int64_t at = row * args.heads * n + c;
        const float* w = args.w + (args.constant_decay ? c : at);
        float* state = args.state_pool + span.slot * args.state_stride + c * n;
        float bonus = 0.0f;
        for (int64_t j = 0; j < n; ++j) bonus += args.r[at + j] * args.k[at + j] * args.bonus[c + j];
        for (int64_t i = 0; i < n; ++i) {
          float* state_row = state + i * n;
          float read = 0.0f;
          for (int64_t j = 0; j < n; ++j) {
            read += state_row[j] * args.r[at + j];
            state_row[j] = state_row[j] * w[j] + args.v[at + i] * args.k[at + j];
          }
          args.y[at + i] = read + bonus * args.v[at + i];
        }
      }
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

absl::Status DeepEmbed(const DeepEmbedArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.width;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int64_t i = 0; i < n; ++i) {
        sum += args.x[row * n + i] * LoadAsFloat(args.table, args.tokens[row], i * n + j);
      }
      args.y[row * n + j] = sum;
    }
  }
  return absl::OkStatus();
}

absl::Status DeepEmbedAttention(const DeepEmbedAttentionArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t query_width = args.k2.rows;
  const int64_t rank = args.k2.cols;
  const int64_t width = args.v2.rows;
  for (int64_t s = 0; s < args.span_count; ++s) {
    const SequenceSpan& span = args.spans[s];
    float* length = args.length.data + span.slot * args.length.stride;
    float* tokens = args.token_cache.data + span.slot * args.token_cache.stride;
    float* key_cache = args.key_cache.data + span.slot * args.key_cache.stride;
    float* value_cache = args.value_cache.data + span.slot * args.value_cache.stride;
    float* q_previous = args.q_previous.data + span.slot * args.q_previous.stride;
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      const auto position = static_cast<int64_t>(*length);
      *length += 1.0f;
      tokens[position] = static_cast<float>(args.tokens[row]);
      std::copy(args.key + row * rank, args.key + (row + 1) * rank, key_cache + position * rank);
      std::copy(args.value + row * rank, args.value + (row + 1) * rank, value_cache + position * rank);

      std::vector<float> q(static_cast<size_t>(query_width));
      for (int64_t c = 0; c < query_width; ++c) {
        const float now = args.q[row * query_width + c];
        q[c] = now + (q_previous[c] - now) * args.x_q[c];
        q_previous[c] = now;
      }
      Normalize(q.data(), args.lnq_weight, args.lnq_bias, query_width, args.epsilon, q.data());

      const std::vector<float> keys = RebuiltRows(key_cache, args.k2, false, args.k_emb, tokens, position + 1, args.x_k,
                                                  args.lnk_weight, args.lnk_bias, args.epsilon);
      const std::vector<float> values = RebuiltRows(value_cache, args.v2, true, args.v_emb, tokens, position + 1,
                                                    args.x_v, args.lnv_weight, args.lnv_bias, args.epsilon);
      std::vector<float> weights;  // exp of the scores, which lie in [-64, 64]
      float sum = 0.0f;
      for (int64_t t = 0; t <= position; ++t) {
        float product = 0.0f;
        for (int64_t c = 0; c < query_width; ++c) product += q[c] * keys[t * query_width + c];
        weights.push_back(std::exp(64.0f * std::tanh(product / 1024.0f)));
        sum += weights.back();
      }
      for (int64_t c = 0; c < width; ++c) {
        float mean = 0.0f;
        for (int64_t t = 0; t <= position; ++t) mean += weights[t] * values[t * width + c];
        args.y[row * width + c] += mean / sum;
      }
    }
  }
  return absl::OkStatus();
}

const OpTable& Table() {
  static constexpr OpTable kTable = {"reference", "reference", Embed,      LayerNorm, TokenShift,
                                     Matmul,      Products,    GroupNorm,  Wkv4,      Wkv6,
                                     Wkv7Prepare, Wkv7,        Wkv7Output, DeepEmbed, DeepEmbedAttention};
  return kTable;
}

std::unique_ptr<Device> OpenDevice() {
  class ReferenceDevice final : public HostDevice {
   public:
    absl::string_view name() const override { return Table().name; }
    absl::string_view numeric_family() const override { return Table().numeric_family; }
    const OpTable& ops() const override { return Table(); }
  };
  return std::make_unique<ReferenceDevice>();
}

}  // namespace rwkv::kernels::reference
