#include "kernels/cpu/cpu.h"

#include <cpuid.h>

#include "absl/strings/string_view.h"
#include "kernels/base/host_device.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {
namespace {

// The table's functions: check, find scratch memory, compute.
template <const KernelSet& kKernels>
struct Ops {
  static absl::Status Embed(const EmbedArgs& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.embed(args);
    return absl::OkStatus();
  }
  static absl::Status LayerNorm(const LayerNormArgs& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.layer_norm(args);
    return absl::OkStatus();
  }
  static absl::Status TokenShift(const TokenShiftArgs& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.token_shift(args);
    return absl::OkStatus();
  }
  static absl::Status Matmul(const MatmulArgs& args, Stream& stream) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    RWKV_ASSIGN_OR_RETURN(void* workspace, stream.Scratch(kKernels.matmul_workspace_bytes(args)));
    kKernels.matmul(args, workspace);
    return absl::OkStatus();
  }
  static absl::Status Products(const ProductsArgs& args, Stream& stream) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    for (int64_t i = 0; i < args.count; ++i) {
      const Product& product = args.products[i];
      RWKV_RETURN_IF_ERROR(Matmul({args.rows, product.weight->matrix, product.x, product.bias, product.activation,
                                   product.gate, product.accumulate, product.y},
                                  stream));
    }
    return absl::OkStatus();
  }
  static absl::Status GroupNorm(const GroupNormArgs& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.group_norm(args);
    return absl::OkStatus();
  }
  static absl::Status Wkv4(const Wkv4Args& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.wkv4(args);
    return absl::OkStatus();
  }
  static absl::Status Wkv6(const Wkv6Args& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.wkv6(args);
    return absl::OkStatus();
  }
  static absl::Status Wkv7Prepare(const Wkv7PrepareArgs& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.wkv7_prepare(args);
    return absl::OkStatus();
  }
  static absl::Status Wkv7(const Wkv7Args& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.wkv7(args);
    return absl::OkStatus();
  }
  static absl::Status Wkv7Output(const Wkv7OutputArgs& args, Stream&) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    kKernels.wkv7_output(args);
    return absl::OkStatus();
  }
  static absl::Status DeepEmbed(const DeepEmbedArgs& args, Stream& stream) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    RWKV_ASSIGN_OR_RETURN(void* workspace, stream.Scratch(kKernels.deep_embed_workspace_bytes(args)));
    kKernels.deep_embed(args, workspace);
    return absl::OkStatus();
  }
  static absl::Status DeepEmbedAttention(const DeepEmbedAttentionArgs& args, Stream& stream) {
    RWKV_RETURN_IF_ERROR(Validate(args));
    RWKV_ASSIGN_OR_RETURN(void* workspace, stream.Scratch(kKernels.deep_embed_attention_workspace_bytes(args)));
    kKernels.deep_embed_attention(args, workspace);
    return absl::OkStatus();
  }
  static constexpr OpTable Table(absl::string_view name, absl::string_view numeric_family) {
    return {name, numeric_family, Embed,       LayerNorm, TokenShift, Matmul,    Products,          GroupNorm,
            Wkv4, Wkv6,           Wkv7Prepare, Wkv7,      Wkv7Output, DeepEmbed, DeepEmbedAttention};
  }
};

constexpr OpTable kPortable = Ops<kPortableKernels>::Table("cpu/portable", "cpu/portable");
constexpr OpTable kAvx2 = Ops<kAvx2Kernels>::Table("cpu/avx2", "cpu/fma");
constexpr OpTable kAvx512 = Ops<kAvx512Kernels>::Table("cpu/avx512", "cpu/fma");

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

class CpuDevice final : public HostDevice {
 public:
  explicit CpuDevice(const OpTable& ops) : ops_(ops) {}

  absl::string_view name() const override { return ops_.name; }
  absl::string_view numeric_family() const override { return ops_.numeric_family; }
  const OpTable& ops() const override { return ops_; }

 private:
  const OpTable& ops_;
};

}  // namespace

std::unique_ptr<Device> OpenDevice(const Backend& backend) { return std::make_unique<CpuDevice>(*backend.table); }

std::vector<Backend> Backends() {
  return {{&kPortable, &kPortableKernels, true},
          {&kAvx2, &kAvx2Kernels, HasAvx2()},
          {&kAvx512, &kAvx512Kernels, HasAvx512()}};
}

}  // namespace rwkv::kernels::cpu
