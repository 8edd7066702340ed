#include "kernels/base/stream.h"

#include "kernels/base/status_macros.h"

namespace rwkv::kernels {

absl::StatusOr<void*> CpuStream::Workspace(int64_t bytes) {
  if (bytes > workspace_.size()) {
    workspace_ = AlignedBuffer<char>();  // Give the old one back first: its contents are nobody's.
    RWKV_ASSIGN_OR_RETURN(workspace_, AlignedBuffer<char>::Create(bytes));
  }
  return static_cast<void*>(workspace_.data());
}

}  // namespace rwkv::kernels
