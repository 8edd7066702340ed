#include "kernels/cuda/device.cuh"
#include "kernels/cuda/testing/mutants.h"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {
namespace {

struct MutantShared {
  float row[64];
  float lanes[64];
  uint64_t count;
};

template <Mutant kMutant>
RWKV_KERNEL(64)
MutantKernel(const float* x, float* y) {
  MutantShared& shared = BlockShared<MutantShared>();
  const int t = ThreadIndex();
  const int at = BlockIndexX() * 64 + t;
  float sum = kMutant == Mutant::kEarly && t == 9 ? x[at] * 0.0f : 0.0f;
  BeginKernel();
  if constexpr (kMutant == Mutant::kAtomic || kMutant == Mutant::kNoAtomic || kMutant == Mutant::kAtomicRead) {
    if (t == 0) shared.count = 0;
    SyncBlock();
    if (kMutant == Mutant::kNoAtomic) {
      shared.count += 1;
    } else {
      AtomicAdd(&shared.count, 1);
    }
    if (kMutant != Mutant::kAtomicRead) SyncBlock();
    sum += static_cast<float>(shared.count) * 0.0f;
  }
  for (int round = 0; round < 2; ++round) {
    if (kMutant != Mutant::kUnwritten || t != 17)
      shared.row[t] = x[kMutant == Mutant::kStrided ? at * 2 % 128 : at] + static_cast<float>(round);
    if (kMutant != Mutant::kNoBarrier) SyncBlock();
    sum += shared.row[kMutant == Mutant::kConflicts ? t * 2 % 64 : 63 - t];
    if (kMutant != Mutant::kNoLastBarrier) SyncBlock();
  }
  shared.lanes[t] = sum;
  if (kMutant != Mutant::kNoSyncWarp) SyncWarp();
  sum += shared.lanes[t ^ 1];
  y[kMutant == Mutant::kStray && at == 127 ? 128 : at] = sum;
  if (kMutant == Mutant::kTwoBlocks && t == 0) y[5] = 1.0f;
}

template <Mutant kMutant>
int LaunchIt(const float* x, float* y) {
  return Launch({nullptr, true}, {2, 1, 64, sizeof(MutantShared)}, "mutant", MutantKernel<kMutant>, x, y);
}

}  // namespace
}  // namespace RWKV_CUDA_BUILD

int LaunchMutant(Mutant mutant, const float* x, float* y) {
  switch (mutant) {
    case Mutant::kNone:
      return LaunchIt<Mutant::kNone>(x, y);
    case Mutant::kNoBarrier:
      return LaunchIt<Mutant::kNoBarrier>(x, y);
    case Mutant::kNoLastBarrier:
      return LaunchIt<Mutant::kNoLastBarrier>(x, y);
    case Mutant::kNoSyncWarp:
      return LaunchIt<Mutant::kNoSyncWarp>(x, y);
    case Mutant::kTwoBlocks:
      return LaunchIt<Mutant::kTwoBlocks>(x, y);
    case Mutant::kUnwritten:
      return LaunchIt<Mutant::kUnwritten>(x, y);
    case Mutant::kStray:
      return LaunchIt<Mutant::kStray>(x, y);
    case Mutant::kStrided:
      return LaunchIt<Mutant::kStrided>(x, y);
    case Mutant::kEarly:
      return LaunchIt<Mutant::kEarly>(x, y);
    case Mutant::kAtomic:
      return LaunchIt<Mutant::kAtomic>(x, y);
    case Mutant::kNoAtomic:
      return LaunchIt<Mutant::kNoAtomic>(x, y);
    case Mutant::kAtomicRead:
      return LaunchIt<Mutant::kAtomicRead>(x, y);
    case Mutant::kConflicts:
      return LaunchIt<Mutant::kConflicts>(x, y);
  }
  return 1;
}

}  // namespace rwkv::kernels::cuda
