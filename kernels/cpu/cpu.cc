#include "kernels/cpu/cpu.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/buffer.h"
#include "kernels/base/host_device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/flush_subnormals.h"
#include "kernels/cpu/kernel_set.h"
#include "kernels/cpu/pack_columns.h"
#include "kernels/cpu/processors.h"
#include "kernels/cpu/thread_team.h"

namespace rwkv::kernels::cpu {
namespace {

// Rows of a part: enough that nobody is woken for less.
constexpr int64_t kRowsOfPart = 8;
constexpr int64_t kChannelsOfPart = 256;

// Heads of a part where a sequence has one row: neighbours' states are fetched ahead, so they should be one thread's.
constexpr int64_t kHeadsOfPart = 3;

// Products that are cut into parts as one operation.
constexpr int64_t kTogether = 8;

class CpuStream final : public HostStream {
 public:
  CpuStream(const Backend& backend, std::unique_ptr<ThreadTeam> team)
      : kernels_(*backend.kernels), rounds_inputs_(backend.rounds_inputs), team_(std::move(team)) {}

  const KernelSet& kernels() const { return kernels_; }
  bool rounds_inputs() const { return rounds_inputs_; }
  int threads() const { return team_->threads(); }

  void RunOnHost(int64_t count, absl::FunctionRef<void(int64_t, int)> work) override {
    team_->Run(count, [&](int64_t part, int thread) {
      const ScopedFlushSubnormals keep(/*flush=*/false);
      work(part, thread);
    });
  }
  int host_threads() const override { return threads(); }

  // As ThreadTeam::Run.
  template <typename Work>
  void RunParts(int64_t parts, Work work) {
    team_->Run(parts, work);
  }

  // Calls work(begin, end, thread) for parts of [0, count).
  template <typename Work>
  void RunRanges(int64_t count, int64_t size, Work work) {
    RunParts((count + size - 1) / size,
             [&](int64_t part, int thread) { work(part * size, std::min(part * size + size, count), thread); });
  }

 private:
  const KernelSet& kernels_;
  const bool rounds_inputs_;
  const std::unique_ptr<ThreadTeam> team_;
};

// The stream of the operations below is always one of theirs.
CpuStream& Cpu(Stream& stream) { return static_cast<CpuStream&>(stream); }

// Scratch memory of each thread's own, at cache lines of its own, and some that they share.
class ThreadScratch {
 public:
  static absl::StatusOr<ThreadScratch> Create(CpuStream& stream, int64_t bytes, int64_t shared_bytes = 0) {
    const int64_t stride = (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    RWKV_ASSIGN_OR_RETURN(void* const memory, stream.Scratch(stride * stream.threads() + shared_bytes));
    return ThreadScratch(static_cast<char*>(memory), stride, stream.threads());
  }
  void* shared() const { return memory_ + threads_ * stride_; }
  void* of(int thread) const { return memory_ + thread * stride_; }
  float* floats_of(int thread) const { return static_cast<float*>(of(thread)); }

 private:
  ThreadScratch(char* memory, int64_t stride, int threads) : memory_(memory), stride_(stride), threads_(threads) {}

  char* memory_;
  int64_t stride_;
  int threads_;
};

// The table's functions: check, find scratch memory, compute.

absl::Status Embed(const EmbedArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  Cpu(stream).RunRanges(args.rows, kRowsOfPart,
                        [&](int64_t begin, int64_t end, int) { kernels.embed(args, begin, end); });
  return absl::OkStatus();
}

absl::Status LayerNorm(const LayerNormArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  Cpu(stream).RunRanges(args.rows, kRowsOfPart,
                        [&](int64_t begin, int64_t end, int) { kernels.layer_norm(args, begin, end); });
  return absl::OkStatus();
}

absl::Status MixInput(const MixInputArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  RWKV_ASSIGN_OR_RETURN(const ThreadScratch scratch,
                        ThreadScratch::Create(Cpu(stream), 2 * args.width * static_cast<int64_t>(sizeof(float))));
  Cpu(stream).RunRanges(args.step->rows, kRowsOfPart, [&](int64_t begin, int64_t end, int thread) {
    kernels.mix_input(args, begin, end, scratch.floats_of(thread));
  });
  if (args.keep_state) return absl::OkStatus();
  for (int64_t s = 0; s < args.step->span_count; ++s) {
    const SequenceSpan& span = args.step->spans[s];
    const int64_t last = span.row_begin + span.row_count - 1;
    if (span.slot == kPaddingSlot || span.row_begin / kRowsOfPart == last / kRowsOfPart) continue;
    kernels.mix_input_state(args, span);
  }
  return absl::OkStatus();
}

// At most kTogether products as one operation of the team.
absl::Status ProductsTogether(int64_t rows, const Product* products, int64_t count, CpuStream& stream) {
  const KernelSet& kernels = stream.kernels();
  std::array<MatmulArgs, kTogether> matmuls;
  std::array<int64_t, kTogether> ends;  // The part behind the product's last.
  int64_t parts = 0;
  int64_t workspace_bytes = 0;
  int64_t prepared_bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Product& product = products[i];
    matmuls[i] = {rows,
                  product.weight->matrix,
                  product.x,
                  product.bias,
                  product.activation,
                  product.gate,
                  product.accumulate,
                  product.y,
                  stream.rounds_inputs(),
                  nullptr,
                  product.weight->packed.data() != nullptr};
    prepared_bytes += kernels.matmul_prepared_bytes(matmuls[i]);
    parts += kernels.matmul_parts(matmuls[i]);
    ends[i] = parts;
    workspace_bytes = std::max(workspace_bytes, kernels.matmul_workspace_bytes(matmuls[i]));
  }
  RWKV_ASSIGN_OR_RETURN(const ThreadScratch workspace, ThreadScratch::Create(stream, workspace_bytes, prepared_bytes));
  if (prepared_bytes > 0) {
    char* prepared = static_cast<char*>(workspace.shared());
    for (int64_t i = 0; i < count; ++i) {
      matmuls[i].prepared = prepared;
      prepared += kernels.matmul_prepared_bytes(matmuls[i]);
    }
    stream.RunRanges(rows, kRowsOfPart, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = 0; i < count; ++i) {
        if (kernels.matmul_prepared_bytes(matmuls[i]) > 0) kernels.prepare_rows(matmuls[i], begin, end);
      }
    });
  }
  stream.RunParts(parts, [&](int64_t part, int thread) {
    int64_t i = 0;
    while (part >= ends[i]) ++i;
    kernels.matmul(matmuls[i], i == 0 ? part : part - ends[i - 1], workspace.of(thread));
  });
  return absl::OkStatus();
}

absl::Status Products(const ProductsArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  for (int64_t begin = 0; begin < args.count; begin += kTogether) {
    const int64_t count = std::min(kTogether, args.count - begin);
    RWKV_RETURN_IF_ERROR(ProductsTogether(args.rows, args.products + begin, count, Cpu(stream)));
  }
  return absl::OkStatus();
}

absl::Status Wkv4(const Wkv4Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  const int64_t parts = (args.width + kChannelsOfPart - 1) / kChannelsOfPart;
  Cpu(stream).RunParts(args.step->span_count * parts, [&](int64_t part, int) {
    const int64_t begin = part % parts * kChannelsOfPart;
    kernels.wkv4(args, args.step->spans[part / parts], begin, std::min(begin + kChannelsOfPart, args.width));
  });
  return absl::OkStatus();
}

// Calls work(span, head, thread) for each head of each span.
template <typename Work>
void RunHeads(const StepRows& step, int64_t heads, CpuStream& stream, Work work) {
  const int64_t of_part = step.rows == step.span_count ? kHeadsOfPart : 1;
  const int64_t parts = (heads + of_part - 1) / of_part;
  stream.RunParts(step.span_count * parts, [&](int64_t part, int thread) {
    const int64_t begin = part % parts * of_part;
    for (int64_t head = begin; head < std::min(begin + of_part, heads); ++head) {
      work(step.spans[part / parts], head, thread);
    }
  });
}

absl::Status Wkv6(const Wkv6Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  RunHeads(*args.step, args.heads, Cpu(stream),
           [&](const SequenceSpan& span, int64_t head, int) { kernels.wkv6(args, span, head); });
  return absl::OkStatus();
}

absl::Status Wkv7(const Wkv7Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  const int64_t bytes = kernels.wkv7_scratch_floats(args.head_size) * static_cast<int64_t>(sizeof(float));
  RWKV_ASSIGN_OR_RETURN(const ThreadScratch scratch, ThreadScratch::Create(Cpu(stream), bytes));
  RunHeads(*args.step, args.heads, Cpu(stream), [&](const SequenceSpan& span, int64_t head, int thread) {
    kernels.wkv7(args, span, head, scratch.floats_of(thread));
  });
  return absl::OkStatus();
}

absl::Status DeepEmbed(const DeepEmbedArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  Cpu(stream).RunRanges(args.rows, kRowsOfPart,
                        [&](int64_t begin, int64_t end, int) { kernels.deep_embed(args, begin, end); });
  return absl::OkStatus();
}

absl::Status DeepEmbedAttention(const DeepEmbedAttentionArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  RWKV_RETURN_IF_ERROR(ValidateCaches(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  RWKV_ASSIGN_OR_RETURN(const ThreadScratch workspace,
                        ThreadScratch::Create(Cpu(stream), kernels.deep_embed_attention_workspace_bytes(args)));
  Cpu(stream).RunParts(args.step->span_count, [&](int64_t part, int thread) {
    kernels.deep_embed_attention(args, args.step->spans[part], workspace.of(thread));
  });
  return absl::OkStatus();
}

class CpuDevice final : public HostDevice {
 public:
  CpuDevice(const Backend& backend, int threads) : backend_(backend), threads_(threads) {}

  absl::string_view name() const override { return backend_.name; }
  absl::string_view numeric_family() const override { return backend_.numeric_family; }
  int threads() const override { return threads_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<ThreadTeam> team, ThreadTeam::Create(threads_));
    return std::make_unique<CpuStream>(backend_, std::move(team));
  }
  // Whole numbers whose inputs are mostly zero are laid by inputs, so that zeros cost nothing.
  absl::StatusOr<Weight> Load(const MatrixView& matrix, WeightUse use) override {
    RWKV_ASSIGN_OR_RETURN(Weight weight, HostDevice::Load(matrix, use));
    const bool is_int8 = matrix.quantization == Quantization::kInt8 && matrix.minimums == nullptr;
    if (use != WeightUse::kSparseProduct || !is_int8) return weight;
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<ThreadTeam> team, ThreadTeam::Create(threads_));
    RWKV_ASSIGN_OR_RETURN(weight.packed, PackColumns(matrix, *team));
    weight.matrix.data = weight.packed.data();
    return weight;
  }
  const OpTable& ops() const override {
    static constexpr OpTable kOps = {Embed, LayerNorm, MixInput,  Products,          Wkv4,
                                     Wkv6,  Wkv7,      DeepEmbed, DeepEmbedAttention};
    return kOps;
  }

 private:
  const Backend backend_;
  const int threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const Backend& backend, int threads) {
  if (threads == 0) threads = std::min(ProcessorsOfThisProcess(), ThreadTeam::kMaxThreads);
  RWKV_RETURN_IF_ERROR(ThreadTeam::Check(threads));
  return std::make_unique<CpuDevice>(backend, threads);
}

}  // namespace rwkv::kernels::cpu
