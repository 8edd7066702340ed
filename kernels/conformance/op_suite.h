// The tests that every operation has, on every backend: its formula, row by row with a derived tolerance, and bit for
// bit the laws. An operation's own test is a table of cases.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/conformance/bounded.h"
#include "kernels/conformance/device_memory.h"

namespace rwkv::kernels::conformance {

using Floats = std::vector<float>;

struct Sequence {
  int64_t length = 0;
  std::vector<Floats> inputs;   // each [length, its width]
  std::vector<Floats> states;   // each of its size
  std::vector<int32_t> tokens;  // [length], or empty: zeros
};

// How sequences are packed: sequence i is in slots[i], slots are `stride_gap` floats apart.
struct Packing {
  std::vector<int32_t> slots = {2, 0, 3};
  int64_t slot_count = 5;
  int64_t stride_gap = 0;
};

// One call of an operation for all sequences, in device memory.
struct OpCall {
  StepRows step;
  std::vector<bool> is_padding;     // [rows]
  std::vector<float*> inputs;       // each [rows, its width]; the call's own
  std::vector<StateTensor> states;  // as a sequence has them
  float* y = nullptr;               // [rows, y_width], NaN
};

// What one row gives.
struct RowResult {
  Bounds y;
  std::vector<Bounds> states;
};

struct OpCase {
  std::string name;
  int64_t y_width = 0;
  std::vector<Sequence> sequences;
  Packing packing;
  bool keeps_state = false;  // A call does not go on where the one before has come to: there is no law of splits.
  // Puts the operation's weights into the memory and enqueues it.
  std::function<absl::Status(DeviceMemory& memory, const OpCall& call)> run;
  // One row by the formula, from a sequence of length 1.
  std::function<RowResult(const Sequence& row)> formula;
};

// For failures.
inline void PrintTo(const std::shared_ptr<const OpCase>& op, std::ostream* out) { *out << op->name; }

// Whether every value lies within its bound of what is expected.
::testing::AssertionResult Within(const Bounds& expected, const Floats& actual);

class OpTest : public ::testing::TestWithParam<std::tuple<std::string, std::shared_ptr<const OpCase>>> {};

std::string OpTestName(const ::testing::TestParamInfo<OpTest::ParamType>& info);

// A table: a base row, and rows that change one thing of it.
template <typename Case>
class Table {
 public:
  template <typename Change>
  void Add(std::string name, Change change) {
    Case c;
    c.name = std::move(name);
    change(c);
    cases_.push_back(c);
  }
  // make(case) -> OpCase
  template <typename Make>
  std::vector<std::shared_ptr<const OpCase>> Build(Make make) const {
    std::vector<std::shared_ptr<const OpCase>> built;
    for (const Case& c : cases_) {
      OpCase op = make(c);
      op.name = c.name;
      built.push_back(std::make_shared<const OpCase>(std::move(op)));
    }
    return built;
  }

 private:
  std::vector<Case> cases_;
};

#define RWKV_TEST_OPERATION(name, cases) \
  INSTANTIATE_TEST_SUITE_P(              \
      name, OpTest, ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(cases)), OpTestName)

struct SequenceResult {
  Floats y;  // [length, width]
  std::vector<Floats> states;
};

// Runs the case's operation on other sequences than its own. A sequence in kPaddingSlot has no states. Fails the test
// if the operation fails, or writes to a pool outside the states of its sequences.
std::vector<SequenceResult> Compute(const std::string& backend, const OpCase& op,
                                    const std::vector<Sequence>& sequences, const Packing& packing);

}  // namespace rwkv::kernels::conformance
