#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/op_table.h"
#include "kernels/api/products.h"
#include "kernels/api/step_rows.h"
#include "kernels/api/wkv7.h"
#include "kernels/base/status_macros.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"

namespace rwkv::gpu {
namespace {

using kernels::MemoryKind;
using kernels::Product;
using kernels::Weight;

constexpr int64_t kHead = 64;
// Weights of so many bytes are gone through before the first come again: more than a device's caches hold.
constexpr int64_t kCold = 256 << 20;
constexpr int kMostSets = 16;

struct Op {
  const char* name;
  std::function<absl::Status(int set)> enqueue;
  int64_t bytes;  // that it cannot do without
  int64_t flop;
  int sets;
};

class Layer {
 public:
  Layer(const Gpu& gpu, int64_t width, int64_t rows) : gpu_(gpu), width_(width), rows_(rows) {}

  absl::Status Measure(double seconds) {
    RWKV_ASSIGN_OR_RETURN(stream_, gpu_.device->NewStream());
    RWKV_RETURN_IF_ERROR(MakeStep());
    RWKV_RETURN_IF_ERROR(MakeOps());
    for (const Op& op : ops_) RWKV_RETURN_IF_ERROR(Measure(op, seconds));
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<float*> Floats(int64_t count) {
    // Not zeros: a GPU multiplies those at higher clocks.
    RWKV_ASSIGN_OR_RETURN(const auto values,
                          kernels::DeviceArray<float>::Create(*gpu_.device, count, MemoryKind::kPinned));
    for (int64_t i = 0; i < count; ++i) values.data()[i] = static_cast<float>(i % 251 - 125) / 128.0f;
    RWKV_ASSIGN_OR_RETURN(auto array, kernels::DeviceArray<float>::Create(*gpu_.device, count));
    RWKV_RETURN_IF_ERROR(stream_->Copy(array.data(), values.data(), array.size_in_bytes()));
    RWKV_RETURN_IF_ERROR(stream_->Synchronize());
    arrays_.push_back(std::move(array));
    return arrays_.back().data();
  }

  absl::Status MakeStep() {
    std::vector<kernels::SequenceSpan> spans;
    for (int64_t row = 0; row < rows_; ++row) spans.push_back({static_cast<int32_t>(row), row, 1});
    RWKV_ASSIGN_OR_RETURN(loader_, kernels::StepRowsLoader::Create(*gpu_.device, rows_, 1));
    RWKV_ASSIGN_OR_RETURN(step_,
                          loader_->Load(spans, std::vector<int32_t>(static_cast<size_t>(rows_)), rows_, *stream_));
    return absl::OkStatus();
  }

  // So many weights of the shape that they are cold when it is their turn again.
  absl::StatusOr<int> Weights(int64_t outputs, int64_t inputs, std::vector<const Weight*>& to) {
    const int64_t bytes = 2 * outputs * inputs;
    const int sets = gpu_.is_emulated ? 1 : static_cast<int>(std::min<int64_t>(kMostSets, kCold / bytes + 1));
    std::vector<uint16_t> values(static_cast<size_t>(outputs * inputs));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(0x3c00 + i % 251);  // bf16: about 0.01
    for (int s = 0; s < sets; ++s) {
      RWKV_ASSIGN_OR_RETURN(
          Weight weight,
          gpu_.device->Load({kernels::DType::kBFloat16, outputs, inputs, values.data()}, kernels::WeightUse::kProduct));
      weights_.push_back(std::move(weight));
      to.push_back(&weights_.back());
    }
    return sets;
  }

  // Products of one shape, `count` at a time, each with its own weights.
  absl::Status AddProducts(const char* name, int count, int64_t outputs, int64_t inputs) {
    std::vector<std::vector<const Weight*>> weights(static_cast<size_t>(count));
    int sets = 0;
    std::vector<Product> products(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
      RWKV_ASSIGN_OR_RETURN(sets, Weights(outputs, inputs, weights[i]));
      RWKV_ASSIGN_OR_RETURN(products[i].x, Floats(rows_ * inputs));
      RWKV_ASSIGN_OR_RETURN(products[i].y, Floats(rows_ * outputs));
    }
    const auto run = [this, weights, products](int set) mutable {
      for (size_t i = 0; i < products.size(); ++i) products[i].weight = weights[i][static_cast<size_t>(set)];
      return gpu_.device->ops().products({rows_, products.data(), static_cast<int64_t>(products.size())}, *stream_);
    };
    ops_.push_back({name, run, count * (2 * outputs * inputs + 4 * rows_ * (inputs + outputs)),
                    2 * count * rows_ * outputs * inputs, sets});
    return absl::OkStatus();
  }

  absl::Status AddMixInput() {
    kernels::MixInputArgs args;
    args.step = &step_;
    args.width = width_;
    args.outputs = 6;
    RWKV_ASSIGN_OR_RETURN(args.x, Floats(rows_ * width_));
    RWKV_ASSIGN_OR_RETURN(args.weight, Floats(width_));
    RWKV_ASSIGN_OR_RETURN(args.bias, Floats(width_));
    RWKV_ASSIGN_OR_RETURN(float* const shift, Floats(rows_ * width_));
    args.shift = {shift, width_};
    for (int m = 0; m < 6; ++m) {
      RWKV_ASSIGN_OR_RETURN(args.mix[m], Floats(width_));
      RWKV_ASSIGN_OR_RETURN(args.y[m], Floats(rows_ * width_));
    }
    const auto run = [this, args](int) { return gpu_.device->ops().mix_input(args, *stream_); };
    ops_.push_back({"mix_input", run, 4 * width_ * (rows_ * 9 + 8), 0, 1});
    return absl::OkStatus();
  }

  absl::Status AddWkv7() {
    kernels::Wkv7Args args;
    args.step = &step_;
    args.heads = width_ / kHead;
    args.head_size = kHead;
    RWKV_ASSIGN_OR_RETURN(float* const state, Floats(rows_ * width_ * kHead));
    args.state = {state, width_ * kHead};
    for (const float** vector :
         {&args.decay_bias, &args.iclr_bias, &args.k_k, &args.k_a, &args.bonus, &args.ln_weight, &args.ln_bias}) {
      RWKV_ASSIGN_OR_RETURN(*vector, Floats(width_));
    }
    for (const float** rows : {&args.r, &args.k, &args.v, &args.g, &args.decay_lora, &args.iclr_lora}) {
      RWKV_ASSIGN_OR_RETURN(*rows, Floats(rows_ * width_));
    }
    RWKV_ASSIGN_OR_RETURN(args.y, Floats(rows_ * width_));
    const auto run = [this, args](int) { return gpu_.device->ops().wkv7(args, *stream_); };
    ops_.push_back({"wkv7", run, 4 * width_ * (rows_ * (2 * kHead + 7) + 7), rows_ * width_ * kHead * 10, 1});
    return absl::OkStatus();
  }

  absl::Status MakeOps() {
    RWKV_RETURN_IF_ERROR(AddMixInput());
    RWKV_RETURN_IF_ERROR(AddProducts("r_k_v", 3, width_, width_));
    RWKV_RETURN_IF_ERROR(AddProducts("ranks_in", 4, 96, width_));
    RWKV_RETURN_IF_ERROR(AddProducts("ranks_out", 4, width_, 96));
    RWKV_RETURN_IF_ERROR(AddWkv7());
    RWKV_RETURN_IF_ERROR(AddProducts("output", 1, width_, width_));
    RWKV_RETURN_IF_ERROR(AddProducts("key", 1, 4 * width_, width_));
    return AddProducts("value", 1, width_, 4 * width_);
  }

  absl::Status Measure(const Op& op, double seconds) {
    int set = 0;
    const auto some = [&](int count) -> absl::Status {
      for (int i = 0; i < count; ++i, ++set) RWKV_RETURN_IF_ERROR(op.enqueue(set % op.sets));
      return stream_->Synchronize();
    };
    const int count = gpu_.is_emulated ? 1 : 3 * kMostSets;
    RWKV_RETURN_IF_ERROR(some(gpu_.is_emulated ? 1 : 2 * kMostSets));
    std::vector<double> times;
    for (const double end = Now() + seconds; times.size() < 3 || Now() < end;) {
      const double begin = Now();
      RWKV_RETURN_IF_ERROR(some(count));
      times.push_back((Now() - begin) / count);
    }
    std::sort(times.begin(), times.end());
    const double time = times[times.size() / 2];
    std::cout << absl::StrFormat(
                     "{\"op\": \"%s\", \"width\": %d, \"rows\": %d, \"us\": %.2f, \"bytes\": %d, \"gb_per_s\": %.1f, "
                     "\"flop\": %d, \"tflop_per_s\": %.2f}",
                     op.name, width_, rows_, time * 1e6, op.bytes, static_cast<double>(op.bytes) / time / 1e9, op.flop,
                     static_cast<double>(op.flop) / time / 1e12)
              << std::endl;
    return absl::OkStatus();
  }

  const Gpu& gpu_;
  const int64_t width_;
  const int64_t rows_;
  std::unique_ptr<kernels::Stream> stream_;
  std::unique_ptr<kernels::StepRowsLoader> loader_;
  kernels::StepRows step_;
  std::deque<kernels::DeviceArray<float>> arrays_;
  std::deque<Weight> weights_;
  std::vector<Op> ops_;
};

}  // namespace

absl::Status OpTimes(const std::string& name, int64_t width, int64_t rows, double seconds) {
  if (width < kHead || width % kHead != 0 || width > 16384 || rows < 1 || rows > 4096) {
    return absl::InvalidArgumentError(absl::StrCat("width ", width, ", rows ", rows));
  }
  RWKV_ASSIGN_OR_RETURN(const Gpu gpu, OpenGpu(name));
  return Layer(gpu, width, rows).Measure(seconds);
}

}  // namespace rwkv::gpu
