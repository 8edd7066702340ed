#include "services/state_store/records/record_pool.h"

#include <sys/mman.h>

#include "services/state_store/records/record_memory.h"

namespace rwkv::state_store {

std::shared_ptr<RecordPool> RecordPool::Create(size_t buffers, size_t buffer_bytes) {
  return std::shared_ptr<RecordPool>(new RecordPool(buffers, buffer_bytes));
}

RecordPool::~RecordPool() {
  for (char* const memory : free_) munmap(memory, buffer_bytes_);
}

std::shared_ptr<char> RecordPool::Take(size_t bytes) {
  if (bytes > buffer_bytes_) return NewRecordMemory(bytes);
  char* memory = nullptr;
  {
    absl::MutexLock lock(&mu_);
    if (!free_.empty()) {
      memory = free_.back();
      free_.pop_back();
    }
  }
  if (memory == nullptr) {
    // Not of the heap, whose large pages would be split again.
    void* const made = mmap(nullptr, buffer_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) return NewRecordMemory(bytes);
    madvise(made, buffer_bytes_, MADV_HUGEPAGE);  // Advice: it only is slower without.
    memory = static_cast<char*>(made);
  }
  return std::shared_ptr<char>(memory, [pool = shared_from_this()](char* done) { pool->GiveBack(done); });
}

void RecordPool::GiveBack(char* memory) {
  {
    absl::MutexLock lock(&mu_);
    if (free_.size() < buffers_) {
      free_.push_back(memory);
      return;
    }
  }
  munmap(memory, buffer_bytes_);
}

}  // namespace rwkv::state_store
