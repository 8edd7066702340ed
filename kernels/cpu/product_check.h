// What a processor's tiles must compute.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {

// A number for the bits of some products of whole numbers and of bf16, with full and broken groups and blocks of few
// and of many rows, inputs rounded and not.
uint64_t HashOfProducts(const KernelSet& kernels);

// The plain twin's (kEmulatedAmxKernels).
constexpr uint64_t kHashOfTileProducts = 0xa9b0b59ae2f1c408;

}  // namespace rwkv::kernels::cpu
