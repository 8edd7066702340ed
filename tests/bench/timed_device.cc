#include "tests/bench/timed_device.h"

#include <chrono>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/api/op_table.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"

namespace rwkv::bench {
namespace {

using kernels::Device;
using kernels::OpTable;
using kernels::Stream;

constexpr int64_t kFloatBytes = 4;

// What an operation says of itself, and what it must move at least: weights read, states read and written.
template <typename Args>
void Describe(const Args&, TimedOp*) {}

void Describe(const kernels::ProductsArgs& args, TimedOp* op) {
  std::string last;
  int64_t repeats = 0;
  const auto flush = [&] {
    if (repeats > 0) absl::StrAppend(&op->detail, op->detail.empty() ? "" : ", ", last);
    if (repeats > 1) absl::StrAppend(&op->detail, " x ", repeats);
  };
  for (int64_t i = 0; i < args.count; ++i) {
    const kernels::MatrixView& matrix = args.products[i].weight->matrix;
    op->bytes += kernels::SizeInBytes(matrix);
    std::string sizes = absl::StrCat(matrix.rows, "x", matrix.cols);
    if (sizes == last) {
      ++repeats;
      continue;
    }
    flush();
    last = std::move(sizes);
    repeats = 1;
  }
  flush();
}

void Describe(const kernels::Wkv7Args& args, TimedOp* op) {
  op->bytes = 2 * args.step->span_count * args.heads * args.head_size * args.head_size * kFloatBytes;
}

void Describe(const kernels::Wkv6Args& args, TimedOp* op) {
  op->bytes = 2 * args.step->span_count * args.heads * args.head_size * args.head_size * kFloatBytes;
}

class TimedStream final : public Stream {
 public:
  TimedStream(const OpTable& ops, std::unique_ptr<Stream> stream, std::vector<TimedOp>* log)
      : ops_(ops), stream_(std::move(stream)), log_(log) {}

  absl::Status Copy(void* to, const void* from, int64_t bytes) override {
    TimedOp op;
    op.kind = "copy";
    op.bytes = 2 * bytes;
    return Time(std::move(op), [&] { return stream_->Copy(to, from, bytes); });
  }
  absl::Status Zero(void* memory, int64_t bytes) override { return stream_->Zero(memory, bytes); }
  absl::Status Record(kernels::Event& event) override { return stream_->Record(event); }
  absl::StatusOr<void*> Scratch(int64_t bytes) override { return stream_->Scratch(bytes); }
  absl::Status Synchronize() override { return stream_->Synchronize(); }
  void* handle() const override { return stream_->handle(); }

  template <typename Args>
  absl::Status Run(absl::string_view kind, absl::Status (*OpTable::*function)(const Args&, Stream&), const Args& args) {
    TimedOp op;
    op.kind = std::string(kind);
    Describe(args, &op);
    return Time(std::move(op), [&] { return (ops_.*function)(args, *stream_); });
  }

 private:
  template <typename Work>
  absl::Status Time(TimedOp op, Work work) {
    op.begin = SteadySeconds();
    const absl::Status status = work();
    op.end = SteadySeconds();
    log_->push_back(std::move(op));
    return status;
  }

  const OpTable& ops_;
  const std::unique_ptr<Stream> stream_;
  std::vector<TimedOp>* const log_;
};

template <auto kOp, typename Args>
absl::Status RunTimed(absl::string_view kind, const Args& args, Stream& stream) {
  return static_cast<TimedStream&>(stream).Run(kind, kOp, args);
}

class TimedDevice final : public Device {
 public:
  TimedDevice(std::unique_ptr<Device> device, std::vector<TimedOp>* log) : device_(std::move(device)), log_(log) {}

  absl::string_view name() const override { return device_->name(); }
  absl::string_view numeric_family() const override { return device_->numeric_family(); }
  std::string identity() const override { return device_->identity(); }
  int threads() const override { return device_->threads(); }
  int64_t warm_up_rows() const override { return device_->warm_up_rows(); }
  absl::StatusOr<kernels::Buffer> Allocate(int64_t bytes, kernels::MemoryKind kind) override {
    return device_->Allocate(bytes, kind);
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device_->NewStream());
    return std::make_unique<TimedStream>(device_->ops(), std::move(stream), log_);
  }
  absl::StatusOr<std::unique_ptr<kernels::Event>> NewEvent() override { return device_->NewEvent(); }
  absl::StatusOr<kernels::Weight> Load(const kernels::MatrixView& matrix, kernels::WeightUse use) override {
    return device_->Load(matrix, use);
  }

  const OpTable& ops() const override {
    static constexpr OpTable kOps = {
        [](const kernels::EmbedArgs& args, Stream& stream) { return RunTimed<&OpTable::embed>("embed", args, stream); },
        [](const kernels::LayerNormArgs& args, Stream& stream) {
          return RunTimed<&OpTable::layer_norm>("layer_norm", args, stream);
        },
        [](const kernels::MixInputArgs& args, Stream& stream) {
          return RunTimed<&OpTable::mix_input>("mix_input", args, stream);
        },
        [](const kernels::ProductsArgs& args, Stream& stream) {
          return RunTimed<&OpTable::products>("products", args, stream);
        },
        [](const kernels::Wkv4Args& args, Stream& stream) { return RunTimed<&OpTable::wkv4>("wkv4", args, stream); },
        [](const kernels::Wkv6Args& args, Stream& stream) { return RunTimed<&OpTable::wkv6>("wkv6", args, stream); },
        [](const kernels::Wkv7Args& args, Stream& stream) { return RunTimed<&OpTable::wkv7>("wkv7", args, stream); },
        [](const kernels::DeepEmbedArgs& args, Stream& stream) {
          return RunTimed<&OpTable::deep_embed>("deep_embed", args, stream);
        },
        [](const kernels::DeepEmbedAttentionArgs& args, Stream& stream) {
          return RunTimed<&OpTable::deep_embed_attention>("deep_embed_attention", args, stream);
        }};
    return kOps;
  }

 private:
  const std::unique_ptr<Device> device_;
  std::vector<TimedOp>* const log_;
};

}  // namespace

double SteadySeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::unique_ptr<Device> TimeDevice(std::unique_ptr<Device> device, std::vector<TimedOp>* log) {
  return std::make_unique<TimedDevice>(std::move(device), log);
}

}  // namespace rwkv::bench
