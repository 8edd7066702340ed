#include "services/state_store/rpc/byte_budget.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "services/common/grpc_status.h"

namespace rwkv::state_store {

absl::StatusOr<ByteBudget::Share> ByteBudget::Take(int64_t bytes, absl::string_view what) {
  absl::MutexLock lock(&mu_);
  if (bytes > free_) {
    return common::WithRetryInfo(
        absl::ResourceExhaustedError(absl::StrCat(what, ": ", bytes, " bytes asked, ", free_, " of ", bytes_, " free")),
        absl::Milliseconds(100));
  }
  free_ -= bytes;
  return Share(this, bytes);
}

void ByteBudget::Return(int64_t bytes) {
  absl::MutexLock lock(&mu_);
  free_ += bytes;
}

}  // namespace rwkv::state_store
