// cuBLASLt without a GPU: the functions that the device uses, over the emulation and the streams of CUDA's fake
// runtime. It is an adversary. What it offers first is of no use, or does not pass its own check; every algorithm sums
// in an order of its own, which changes with the shape, and one that splits sums gives other bits at every row; a
// workspace is overwritten; and what is not as the library wants it is a violation, told to the fake runtime in words:
// descriptions and contexts that are gone or none, values of a wrong size, an algorithm of another shape or device,
// memory that is not the device's, too small, misaligned or used twice, a search for algorithms in a step.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/cuda/cublaslt.h"

namespace rwkv::kernels::cuda::cublaslt {

extern const CublasLt kFakeCublasLt;

struct FakeFaults {
  int version = 130100;
  bool no_driver = false;                      // create() says kNotInitialized, as the library does without one.
  bool no_algorithm = false;                   // The heuristic finds nothing.
  bool checks_fail = false;                    // No algorithm passes algo_check().
  bool offers_splits = false;                  // Of sums that are split, though nobody allows it, and as the first.
  int64_t other_choice = 0;                    // Added to the number of each algorithm.
  int64_t workspace_bytes = 1 << 20;           // What algorithms need.
  int64_t no_memory_at = -1;                   // The n-th matmul from now on (0: the next) finds no memory.
  int64_t fail_at = -1;                        // The n-th and all behind it fail,
  int64_t fail_with = kExecutionFailed;        // with this result.
  absl::Duration slow = absl::ZeroDuration();  // What every matmul takes at least.
};

// "fail_at=5,fail_with=15", for the command line of a test's process. kInvalidArgument: says what is none.
absl::StatusOr<FakeFaults> ParseFakeFaults(absl::string_view text);

// Faults from now on; counts begin anew. Contexts and descriptions stay.
void ResetFake(const FakeFaults& faults = {});

struct FakeCounts {
  int64_t contexts = 0;      // now
  int64_t descriptions = 0;  // now: of products, matrices and preferences
  int64_t searches = 0;      // of heuristics
  int64_t matmuls = 0;
};
FakeCounts CountsOfFake();

}  // namespace rwkv::kernels::cuda::cublaslt
