// Memory for the records of calls, kept from call to call: to have it made anew, page by page, takes as long as the disk
// takes for the records themselves. Pages are large where the system has such, which the disk takes faster by a quarter.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace rwkv::state_store {

// Thread-safe.
class RecordPool : public std::enable_shared_from_this<RecordPool> {
 public:
  // Keeps at most so many free buffers, of `buffer_bytes` each as far as they were ever written to.
  static std::shared_ptr<RecordPool> Create(size_t buffers, size_t buffer_bytes);
  ~RecordPool();

  // As NewRecordMemory() gives it (record_memory.h); never waits. What is larger than a buffer is not kept. May outlive
  // the pool's owner.
  std::shared_ptr<char> Take(size_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  RecordPool(size_t buffers, size_t buffer_bytes) : buffers_(buffers), buffer_bytes_(buffer_bytes) {}

  void GiveBack(char* memory) ABSL_LOCKS_EXCLUDED(mu_);

  const size_t buffers_;
  const size_t buffer_bytes_;
  absl::Mutex mu_;
  std::vector<char*> free_ ABSL_GUARDED_BY(mu_);  // The last used is used next: its pages are there.
};

}  // namespace rwkv::state_store
