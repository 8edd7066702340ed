// NCCL without GPUs, between processes of one machine or threads of one process: the functions that links use, over
// Unix sockets and the streams of CUDA's fake runtime. It is an adversary: a communicator is ready only when both ends
// have asked often enough; the first transfer is taken only once the other end has called, too; a receive buffer is 0xFF
// until its stream has got there, a send is not done before the other end has received; and what NCCL forbids or leaves
// undefined is a violation, told in words.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "services/worker/link/nccl.h"

namespace rwkv::worker::nccl {

extern const Nccl kFakeNccl;

// Transfers are counted over all communicators of the process: a group is one.
struct FakeFaults {
  int version = 22809;
  bool never_ready = false;                    // Communicators never become ready, and say nothing.
  bool abort_hangs = false;                    // ncclCommAbort does not return before ResetFake().
  int64_t hang_at = -1;                        // The n-th transfer (0: the first) never ends, and says nothing.
  int64_t fail_at = -1;                        // At the n-th an error comes up later, as ncclCommGetAsyncError tells.
  int64_t die_at = -1;                         // At the n-th the process is killed.
  absl::Duration slow = absl::ZeroDuration();  // What every transfer takes at least.
};

// "hang_at=5,slow=1ms", for the command line of a test's process. kInvalidArgument: says what is none.
absl::StatusOr<FakeFaults> ParseFakeFaults(absl::string_view text);

// Faults from now on; forgets violations and counts, and lets aborts that hang go.
void ResetFake(const FakeFaults& faults = {});

int64_t TransfersOfFake();  // That have ended well.
int CommunicatorsOfFake();  // That live: neither aborted nor failed to begin.
std::vector<std::string> ViolationsOfFake();

}  // namespace rwkv::worker::nccl
