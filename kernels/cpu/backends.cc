// Which builds of simd_kernels.h are here, and which of them this processor runs.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>
#include <iostream>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {

#if defined(__x86_64__)
namespace {

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

bool HasAvx512Vnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }

// AMX, and the kernel's permission to use it in this process, which has to be asked for.
bool HasAmx() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!HasAvx512Vnni() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned int kTilesOfBytes = 1u << 24 | 1u << 25;  // AMX-TILE, AMX-INT8
  if ((edx & kTilesOfBytes) != kTilesOfBytes) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Whether both kernel sets give the same bits for a product that has full and broken groups and blocks of rows.
bool GiveTheSameBits(const KernelSet& a, const KernelSet& b) {
  constexpr int64_t kRows = 19, kInputs = 150, kOutputs = 37, kGroups = 3;
  std::vector<int8_t> codes(kOutputs * kInputs);
  std::vector<uint16_t> scales(kOutputs * kGroups);
  std::vector<float> x(kRows * kInputs);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i * 37 % 255 - 127);
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint16_t>(0x2000 + i * 71 % 0x800);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 613 % 1009) / 256.0f - 2.0f;
  const auto multiply = [&](const KernelSet& kernels) {
    MatmulArgs args;
    args.rows = kRows;
    args.weight.rows = kOutputs;
    args.weight.cols = kInputs;
    args.weight.data = codes.data();
    args.weight.quantization = Quantization::kInt8;
    args.weight.group = 64;
    args.weight.scales = scales.data();
    args.x = x.data();
    std::vector<float> y(kRows * kOutputs);
    args.y = y.data();
    struct alignas(64) Line {
      char bytes[64];
    };
    std::vector<Line> prepared(static_cast<size_t>(kernels.matmul_prepared_bytes(args) / 64 + 1));
    std::vector<Line> workspace(static_cast<size_t>(kernels.matmul_workspace_bytes(args) / 64 + 1));
    args.prepared = prepared.data();
    kernels.prepare_rows(args, 0, kRows);
    for (int64_t part = 0; part < kernels.matmul_parts(args); ++part) kernels.matmul(args, part, workspace.data());
    return y;
  };
  const std::vector<float> ya = multiply(a), yb = multiply(b);
  return std::memcmp(ya.data(), yb.data(), ya.size() * sizeof(float)) == 0;
}

// AMX is used where it shows at start that its bits are those of everybody else.
bool AmxRunsHere() {
  if (!HasAmx()) return false;
  if (GiveTheSameBits(kAmxKernels, kAvx512VnniKernels)) return true;
  std::cerr << "this processor's AMX gives other bits than its AVX-512: cpu/amx is not used" << std::endl;
  return false;
}

}  // namespace

std::vector<Backend> Backends() {
  static const bool amx_runs_here = AmxRunsHere();
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true},
          {"cpu/avx2", "cpu/fma", &kAvx2Kernels, HasAvx2()},
          {"cpu/avx512", "cpu/fma", &kAvx512Kernels, HasAvx512()},
          {"cpu/avx512vnni", "cpu/fma", &kAvx512VnniKernels, HasAvx512Vnni()},
          {"cpu/amx", "cpu/fma", &kAmxKernels, amx_runs_here}};
}

#elif defined(__aarch64__)
std::vector<Backend> Backends() {
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true}, {"cpu/neon", "cpu/neon", &kNeonKernels, true}};
}
#else
std::vector<Backend> Backends() { return {{"cpu/portable", "cpu/portable", &kPortableKernels, true}}; }
#endif

}  // namespace rwkv::kernels::cpu
