#include "kernels/cpu/cpu.h"

namespace rwkv::kernels::cpu {
std::vector<Backend> Backends() { return {}; }
}  // namespace rwkv::kernels::cpu
