#include "kernels/cpu/cpu.h"

#include <cpuid.h>

#include <algorithm>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/buffer.h"
#include "kernels/base/host_device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {
namespace {

// Rows of a part: enough that nobody is woken for less.
constexpr int64_t kRowsOfPart = 8;
constexpr int64_t kChannelsOfPart = 256;

class CpuStream final : public HostStream {
 public:
  explicit CpuStream(const KernelSet& kernels) : kernels_(kernels) {}

  const KernelSet& kernels() const { return kernels_; }
  int threads() const { return 1; }

  // Calls work(part, thread) once for each of [0, parts), on any of the threads and in any order; returns when all are
  // done.
  template <typename Work>
  void RunParts(int64_t parts, Work work) {
    for (int64_t part = 0; part < parts; ++part) work(part, 0);
  }

  // Calls work(begin, end, thread) for parts of [0, count).
  template <typename Work>
  void RunRanges(int64_t count, int64_t size, Work work) {
    RunParts((count + size - 1) / size,
             [&](int64_t part, int thread) { work(part * size, std::min(part * size + size, count), thread); });
  }

 private:
  const KernelSet& kernels_;
};

// The stream of the operations below is always one of theirs.
CpuStream& Cpu(Stream& stream) { return static_cast<CpuStream&>(stream); }

// Scratch memory of each thread's own, at cache lines of its own.
class ThreadScratch {
 public:
  static absl::StatusOr<ThreadScratch> Create(CpuStream& stream, int64_t bytes) {
    const int64_t stride = (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    RWKV_ASSIGN_OR_RETURN(void* const memory, stream.Scratch(stride * stream.threads()));
    return ThreadScratch(static_cast<char*>(memory), stride);
  }
  void* of(int thread) const { return memory_ + thread * stride_; }
  float* floats_of(int thread) const { return static_cast<float*>(of(thread)); }

 private:
  ThreadScratch(char* memory, int64_t stride) : memory_(memory), stride_(stride) {}

  char* memory_;
  int64_t stride_;
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

absl::Status Products(const ProductsArgs& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  for (int64_t i = 0; i < args.count; ++i) {
    const Product& product = args.products[i];
    const MatmulArgs matmul = {args.rows,          product.weight->matrix, product.x,          product.bias,
                               product.activation, product.gate,           product.accumulate, product.y};
    RWKV_ASSIGN_OR_RETURN(void* const workspace, stream.Scratch(kernels.matmul_workspace_bytes(matmul)));
    kernels.matmul(matmul, workspace);
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

absl::Status Wkv6(const Wkv6Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  Cpu(stream).RunParts(args.step->span_count * args.heads, [&](int64_t part, int) {
    kernels.wkv6(args, args.step->spans[part / args.heads], part % args.heads);
  });
  return absl::OkStatus();
}

absl::Status Wkv7(const Wkv7Args& args, Stream& stream) {
  RWKV_RETURN_IF_ERROR(Validate(args));
  const KernelSet& kernels = Cpu(stream).kernels();
  const int64_t bytes = kernels.wkv7_scratch_floats(args.head_size) * static_cast<int64_t>(sizeof(float));
  RWKV_ASSIGN_OR_RETURN(const ThreadScratch scratch, ThreadScratch::Create(Cpu(stream), bytes));
  Cpu(stream).RunParts(args.step->span_count * args.heads, [&](int64_t part, int thread) {
    kernels.wkv7(args, args.step->spans[part / args.heads], part % args.heads, scratch.floats_of(thread));
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
  explicit CpuDevice(const Backend& backend) : backend_(backend) {}

  absl::string_view name() const override { return backend_.name; }
  absl::string_view numeric_family() const override { return backend_.numeric_family; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return std::make_unique<CpuStream>(*backend_.kernels);
  }
  const OpTable& ops() const override {
    static constexpr OpTable kOps = {Embed, LayerNorm, MixInput,  Products,          Wkv4,
                                     Wkv6,  Wkv7,      DeepEmbed, DeepEmbedAttention};
    return kOps;
  }

 private:
  const Backend backend_;
};

// __builtin_cpu_supports asks the operating system too whether it saves the wide registers; F16C it does not know.
bool HasF16c() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c(); }

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

std::unique_ptr<Device> OpenDevice(const Backend& backend) { return std::make_unique<CpuDevice>(backend); }

std::vector<Backend> Backends() {
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true},
          {"cpu/avx2", "cpu/fma", &kAvx2Kernels, HasAvx2()},
          {"cpu/avx512", "cpu/fma", &kAvx512Kernels, HasAvx512()}};
}

}  // namespace rwkv::kernels::cpu
