// Which builds of simd_kernels.h are here, and which of them this processor runs.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <iostream>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/kernel_set.h"
#include "kernels/cpu/product_check.h"

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

// And products of pairs of bf16.
bool HasAvx512Bf16() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned int kBf16 = 1u << 5;
  return HasAvx512Vnni() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kBf16) != 0;
}

// AMX, and the kernel's permission to use it in this process, which has to be asked for.
bool HasAmx() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!HasAvx512Vnni() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned int kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if ((edx & kTiles) != kTiles) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// AMX is used where it shows at start that its bits are those of its plain twin.
bool AmxRunsHere() {
  if (!HasAmx()) return false;
  if (HashOfProducts(kAmxKernels) == kHashOfTileProducts) return true;
  std::cerr << "this processor's AMX gives other bits than its description: cpu/amx is not used" << std::endl;
  return false;
}

}  // namespace

std::vector<Backend> Backends() {
  static const bool amx_runs_here = AmxRunsHere();
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true},
          {"cpu/avx2", "cpu/fma", &kAvx2Kernels, HasAvx2()},
          {"cpu/avx512", "cpu/fma", &kAvx512Kernels, HasAvx512()},
          {"cpu/avx512/bf16", "cpu/avx512/bf16", &kAvx512VnniKernels, HasAvx512Bf16(), true},
          {"cpu/avx512vnni", "cpu/fma", &kAvx512VnniKernels, HasAvx512Vnni()},
          {"cpu/amx/bf16", "cpu/amx/bf16", &kAmxKernels, amx_runs_here, true},
          {"cpu/amx", "cpu/amx", &kAmxKernels, amx_runs_here}};
}

#elif defined(__aarch64__)
std::vector<Backend> Backends() {
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true}, {"cpu/neon", "cpu/neon", &kNeonKernels, true}};
}
#else
std::vector<Backend> Backends() { return {{"cpu/portable", "cpu/portable", &kPortableKernels, true}}; }
#endif

}  // namespace rwkv::kernels::cpu
