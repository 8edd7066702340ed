// What the instructions of PTX do (ptx.h): as its ISA says, rounding to nearest even, with subnormal numbers.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace rwkv::kernels::cuda::ptx {

// A thread's registers are words, of which a register is the low bits; a predicate is 0 or 1. An address is a pointer,
// an offset into the block's shared memory, or one into the parameters.
struct Thread {
  uint64_t* registers;
  const char* parameters;
  int64_t parameter_bytes;
  int next;  // The instruction that comes; below 0: none.
};

constexpr int kMostOperands = 16;

struct Instruction {
  void (*run)(Thread& thread, const Instruction& instruction) = nullptr;
  int line = 0;    // Of the text.
  int guard = -1;  // The register of the predicate that says whether it runs; -1: always.
  bool guard_is_not = false;
  int target = -1;                    // Of a branch: the instruction.
  int count = 1;                      // Elements of a vector.
  int64_t offset = 0;                 // Added to an address.
  int registers[kMostOperands] = {};  // In the order of the text, of vectors one by one; constants are registers, too.
};

// By its name in the text, without a guard: "add.s32". Sets what it does and the vector's count; `operands`: how many
// registers it has. kUnimplemented: none of these kernels has had it so far.
absl::Status SetMeaning(absl::string_view name, Instruction& instruction, int& operands);

}  // namespace rwkv::kernels::cuda::ptx
