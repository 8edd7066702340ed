// What the tests of operations with a state share: several sequences packed into one call, and the laws of a
// recurrence, bit for bit.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_pool.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels::conformance {

using Floats = std::vector<float>;

struct Sequence {
  int64_t length = 0;
  std::vector<Floats> inputs;  // each [length, its width]
  std::vector<Floats> states;  // each of its size
};

struct SequenceResult {
  Floats y;  // [length, width]
  std::vector<Floats> states;
};

// One call of an operation for all sequences.
struct PackedCall {
  int64_t rows = 0;
  std::vector<SequenceSpan> spans;
  std::vector<Floats> inputs;     // each [rows, its width]
  std::vector<StatePool> states;  // of `slots` slots
  int64_t slots = 0;
  float* y = nullptr;  // [rows, y_width], zeros
};

// An operation, its weights and sizes.
struct Recurrence {
  int64_t y_width = 0;
  std::function<absl::Status(const OpTable&, const PackedCall&, Stream&)> run;
};

// How sequences are packed: sequence i is in slots[i], slots are `stride_gap` floats apart.
struct Packing {
  std::vector<int32_t> slots;
  int64_t slot_count = 0;
  int64_t stride_gap = 0;
};

// Fails the test if the operation fails, or writes to a pool outside the states of its sequences.
std::vector<SequenceResult> Compute(const OpTable& table, const Recurrence& recurrence,
                                    const std::vector<Sequence>& sequences, const Packing& packing);

// Tokens [begin, end) of a sequence, from `states` on.
Sequence Slice(const Sequence& sequence, int64_t begin, int64_t end, const std::vector<Floats>& states);

// All of them fail the test where bits differ.
void ExpectSequencesAreIndependent(const OpTable& table, const Recurrence& recurrence,
                                   const std::vector<Sequence>& sequences, const Packing& packing);
void ExpectOrderIsFree(const OpTable& table, const Recurrence& recurrence, const std::vector<Sequence>& sequences,
                       const Packing& packing);
void ExpectAnySplitIsTheWhole(const OpTable& table, const Recurrence& recurrence,
                              const std::vector<Sequence>& sequences);
void ExpectFamilyAgrees(const OpTable& table, const Recurrence& recurrence, const std::vector<Sequence>& sequences,
                        const Packing& packing);

}  // namespace rwkv::kernels::conformance
