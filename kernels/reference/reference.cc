#include "kernels/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/base/fixed_point.h"
#include "kernels/base/host_device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"
#include "kernels/reference/fixed_point_row.h"
#include "kernels/reference/pieces.h"

namespace rwkv::kernels::reference {
namespace {

using Floats = std::vector<float>;

float Activate(Activation activation, float z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return std::tanh(z);
    case Activation::kSquaredRelu:
      return z > 0.0f || std::isnan(z) ? z * z : 0.0f;
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kDecay:
      return std::exp(-std::exp(z));
  }
  return z;
}

// One row of a product's inputs.
class Row {
 public:
  Row(const MatrixView& weight, const float* x) : x_(x) {
    if (FixedPointGroup(weight) != 0) fixed_.emplace(weight, x);
  }
  float Dot(const MatrixView& weight, int64_t o) const {
    if (fixed_.has_value()) return fixed_->Dot(weight, o);
    float sum = 0.0f;
    for (int64_t k = 0; k < weight.cols; ++k) sum += x_[k] * LoadAsFloat(weight, o, k);
    return sum;
  }

 private:
  const float* x_;
  std::optional<FixedPointRow> fixed_;
};

void Compute(const Product& product, int64_t rows) {
  const MatrixView& weight = product.weight->matrix;
  for (int64_t row = 0; row < rows; ++row) {
    const Row x(weight, product.x + row * weight.cols);
    for (int64_t o = 0; o < weight.rows; ++o) {
      float z = x.Dot(weight, o);
      if (product.bias != nullptr) z += product.bias[o];
      z = Activate(product.activation, z);
      if (product.gate != nullptr) z *= product.gate[row * weight.rows + o];
      float& y = product.y[row * weight.rows + o];
      y = product.accumulate ? y + z : z;
    }
  }
}

// The keys or values of the first `count` cached tokens [count, expand.rows]: act(cache expand^T) * table[token], mixed
// with the row before (zeros before the first), normalised.
Floats RebuiltRows(const float* cache, const MatrixView& expand, bool tanh, const float* table, const float* tokens,
                   int64_t count, const float* mix, const float* norm_weight, const float* norm_bias, float epsilon) {
  const int64_t width = expand.rows;
  Floats rows(static_cast<size_t>(count * width));
  Floats previous(static_cast<size_t>(width));
  for (int64_t t = 0; t < count; ++t) {
    float* row = rows.data() + t * width;
    const Row token(expand, cache + t * expand.cols);
    for (int64_t c = 0; c < width; ++c) {
      const float z = token.Dot(expand, c);
      const float now = (tanh ? std::tanh(z) : z) * table[static_cast<int64_t>(tokens[t]) * width + c];
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
  const int64_t width = args.embedding->matrix.cols;
  for (int64_t row = 0; row < args.rows; ++row) {
    float* x = args.x + row * width;
    for (int64_t c = 0; c < width; ++c) x[c] = LoadAsFloat(args.embedding->matrix, args.tokens[row], c);
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

absl::Status MixInput(const MixInputArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.width;
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    const bool padding = span.slot == kPaddingSlot;
    Floats before = padding ? Floats(n) : Floats(args.shift.of(span.slot), args.shift.of(span.slot) + n);
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      Floats now(args.x + row * n, args.x + (row + 1) * n);
      if (args.weight != nullptr) Normalize(now.data(), args.weight, args.bias, n, args.epsilon, now.data());
      if (padding) std::fill(now.begin(), now.end(), 0.0f);
      if (args.normed != nullptr) std::copy(now.begin(), now.end(), args.normed + row * n);
      for (int64_t m = 0; m < args.outputs; ++m) {
        Floats mix(args.mix[m], args.mix[m] + n);
        for (int64_t c = 0; c < n && args.mix_delta[m] != nullptr; ++c) mix[c] += args.mix_delta[m][row * n + c];
        Shift(now.data(), before.data(), mix.data(), n, args.y[m] + row * n);
        if (padding) std::fill_n(args.y[m] + row * n, n, 0.0f);
      }
      before = now;
    }
    if (!padding && !args.keep_state) std::copy(before.begin(), before.end(), args.shift.of(span.slot));
  }
  return absl::OkStatus();
}

absl::Status Products(const ProductsArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t i = 0; i < args.count; ++i) Compute(args.products[i], args.rows);
  return absl::OkStatus();
}

absl::Status Wkv4(const Wkv4Args& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      for (int64_t c = 0; c < args.width; ++c) {
        const int64_t at = row * args.width + c;
        args.y[at] =
            span.slot == kPaddingSlot
                ? 0.0f
                : args.r[at] * Recur4(args.decay[c], args.bonus[c], args.k[at], args.v[at], args.aa.of(span.slot) + c,
                                      args.bb.of(span.slot) + c, args.pp.of(span.slot) + c);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv6(const Wkv6Args& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      for (int64_t c = 0; c < args.heads * n; c += n) {
        const int64_t at = row * args.heads * n + c;
        if (span.slot == kPaddingSlot) {
          std::fill_n(args.y + at, n, 0.0f);
          continue;
        }
        Recur6(args.r + at, args.w + (args.constant_decay ? c : at), args.k + at, args.v + at, args.bonus + c, n,
               args.state.of(span.slot) + c * n, args.y + at);
        Normalize(args.y + at, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, args.y + at);
        for (int64_t j = at; j < at + n && args.gate != nullptr; ++j) args.y[j] *= args.gate[j];
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Wkv7(const Wkv7Args& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const int64_t n = args.head_size;
  Floats w(n), a(n), b(n);
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      for (int64_t c = 0; c < args.heads * n; c += n) {
        const int64_t at = row * args.heads * n + c;
        if (span.slot == kPaddingSlot) {
          std::fill_n(args.y + at, n, 0.0f);
          continue;
        }
        Prepare7 prepare = {args.decay_bias + c,
                            args.iclr_bias + c,
                            args.k_k + c,
                            args.k_a + c,
                            args.decay_lora + at,
                            args.iclr_lora + at,
                            nullptr,
                            nullptr,
                            nullptr};
        if (args.v_first != nullptr) {
          prepare.gate_bias = args.value_gate_bias + c;
          prepare.gate_lora = args.value_gate_lora + at;
          prepare.v_first = args.v_first + at;
        }
        const float* const r = args.r + at;
        Floats k(args.k + at, args.k + at + n);
        Floats v(args.v + at, args.v + at + n);
        PrepareFor7(prepare, n, k.data(), v.data(), w.data(), a.data(), b.data());
        Recur7(r, w.data(), k.data(), v.data(), a.data(), b.data(), n, args.state.of(span.slot) + c * n, args.y + at);
        Normalize(args.y + at, args.ln_weight + c, args.ln_bias + c, n, args.epsilon, args.y + at);
        AddBonusAndGate(r, k.data(), v.data(), args.bonus + c, args.g + at, n, args.y + at);
      }
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
      for (int64_t i = 0; i < n; ++i) sum += args.x[row * n + i] * args.matrices[(row * n + i) * n + j];
      args.y[row * n + j] = sum;
    }
  }
  return absl::OkStatus();
}

absl::Status DeepEmbedAttention(const DeepEmbedAttentionArgs& args, Stream&) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  RWKV_RETURN_IF_ERROR(ValidateCaches(args));
  const int64_t query_width = args.k2->matrix.rows;
  const int64_t rank = args.k2->matrix.cols;
  const int64_t width = args.v2->matrix.rows;
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    if (span.slot == kPaddingSlot) continue;
    float* length = args.length.of(span.slot);
    float* tokens = args.token_cache.of(span.slot);
    float* key_cache = args.key_cache.of(span.slot);
    float* value_cache = args.value_cache.of(span.slot);
    float* q_previous = args.q_previous.of(span.slot);
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      const auto position = static_cast<int64_t>(*length);
      *length += 1.0f;
      tokens[position] = static_cast<float>(args.step->tokens[row]);
      std::copy(args.key + row * rank, args.key + (row + 1) * rank, key_cache + position * rank);
      std::copy(args.value + row * rank, args.value + (row + 1) * rank, value_cache + position * rank);

      Floats q(static_cast<size_t>(query_width));
      Shift(args.q + row * query_width, q_previous, args.x_q, query_width, q.data());
      std::copy_n(args.q + row * query_width, query_width, q_previous);
      Normalize(q.data(), args.lnq_weight, args.lnq_bias, query_width, args.epsilon, q.data());

      const Floats keys = RebuiltRows(key_cache, args.k2->matrix, false, args.k_emb, tokens, position + 1, args.x_k,
                                      args.lnk_weight, args.lnk_bias, args.epsilon);
      const Floats values = RebuiltRows(value_cache, args.v2->matrix, true, args.v_emb, tokens, position + 1, args.x_v,
                                        args.lnv_weight, args.lnv_bias, args.epsilon);
      Floats weights;  // exp of the scores, which lie in [-64, 64]
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

std::unique_ptr<Device> OpenDevice() {
  class ReferenceDevice final : public HostDevice {
   public:
    absl::string_view name() const override { return "reference"; }
    absl::string_view numeric_family() const override { return "reference"; }
    const OpTable& ops() const override {
      static constexpr OpTable kOps = {Embed, LayerNorm, MixInput,  Products,          Wkv4,
                                       Wkv6,  Wkv7,      DeepEmbed, DeepEmbedAttention};
      return kOps;
    }
  };
  return std::make_unique<ReferenceDevice>();
}

}  // namespace rwkv::kernels::reference
