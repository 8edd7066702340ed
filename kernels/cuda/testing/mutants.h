// A correct kernel, and the same with one thing wrong: what the checker must see. Built with its instrumentation.
#pragma once

namespace rwkv::kernels::cuda {

enum class Mutant {
  kNone,
  kNoBarrier,      // between writing a row in shared memory and reading the neighbour's
  kNoLastBarrier,  // before the row is written again
  kNoSyncWarp,     // between lanes of one warp
  kTwoBlocks,      // both write one element
  kUnwritten,      // one element of the row is never written
  kStray,          // one element behind y
  kStrided,        // reads every other element of x: right, and slow
  kEarly,          // an element of x is read before BeginKernel()
  kAtomic,         // all threads add to one number: right
  kNoAtomic,       // all threads add to one number, each by reading and writing it
  kAtomicRead,     // such a number is read before a barrier
  kConflicts,      // reads every other element of the row: so too
};

// Two blocks of 64 threads; x and y are [128]. 0 if it ran.
int LaunchMutant(Mutant mutant, const float* x, float* y);

}  // namespace rwkv::kernels::cuda
