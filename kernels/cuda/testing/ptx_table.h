// What the files of PTX's instructions share: their operands, and the table that names them.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "kernels/cuda/testing/ptx_instructions.h"

namespace rwkv::kernels::cuda::ptx {

template <typename T>
T In(const Thread& thread, const Instruction& instruction, int operand) {
  T value;
  std::memcpy(&value, &thread.registers[instruction.registers[operand]], sizeof(value));
  return value;
}

template <typename T>
void Out(Thread& thread, const Instruction& instruction, int operand, T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  thread.registers[instruction.registers[operand]] = word;
}

// What it does, and how many registers it has; of accesses one besides those of the vector.
struct Meaning {
  void (*run)(Thread& thread, const Instruction& instruction);
  int operands;
};
constexpr int kOfVector = -1;
using Table = std::map<std::string, Meaning, std::less<>>;

// Of numbers and bits: ptx_arithmetic.cc. The rest is ptx_instructions.cc.
void AddArithmetic(Table& table);

}  // namespace rwkv::kernels::cuda::ptx
