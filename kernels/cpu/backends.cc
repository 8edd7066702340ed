// Which builds of simd_kernels.h are here, and which of them this processor runs.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

}  // namespace

std::vector<Backend> Backends() {
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true},
          {"cpu/avx2", "cpu/fma", &kAvx2Kernels, HasAvx2()},
          {"cpu/avx512", "cpu/fma", &kAvx512Kernels, HasAvx512()},
          {"cpu/avx512vnni", "cpu/fma", &kAvx512VnniKernels, HasAvx512Vnni()}};
}

#elif defined(__aarch64__)
std::vector<Backend> Backends() {
  return {{"cpu/portable", "cpu/portable", &kPortableKernels, true}, {"cpu/neon", "cpu/neon", &kNeonKernels, true}};
}
#else
std::vector<Backend> Backends() { return {{"cpu/portable", "cpu/portable", &kPortableKernels, true}}; }
#endif

}  // namespace rwkv::kernels::cpu
