// Many threads of control on one CPU thread: each is a fiber with a stack of its own, and a scheduler resumes one at a
// time. Known to the sanitizers. Not thread-safe, but the scheduler may be another thread each time that all of them
// have ended or are given up.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace rwkv::kernels::cuda::emulation {

class Fibers {
 public:
  // Memory of a stack: [begin, end).
  struct Stack {
    const char* begin = nullptr;
    const char* end = nullptr;
  };

  // Stacks take addresses at once and memory as it is touched. Whoever grows out of his faults.
  explicit Fibers(int count);
  ~Fibers() = delete;  // One for the process.

  const Stack& stack(int fiber) const { return fibers_[fiber].stack; }

  // Of the scheduler. `run` begins when the fiber is resumed next; what the fiber did before is given up, without
  // destructors.
  void Start(int fiber, void (*run)());
  // Returns when the fiber suspends itself, or `run` has returned: then it must not be resumed.
  void Resume(int fiber);

  // Of the fiber that runs.
  void Suspend() { BackToScheduler(false); }

 private:
  struct Fiber {
    boost::context::detail::fcontext_t context = nullptr;
    Stack stack;
    void (*run)() = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's.
    void* tsan_fiber = nullptr;  // ThreadSanitizer's.
  };

  static void Enter(boost::context::detail::transfer_t from);
  void BackToScheduler(bool for_good);

  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  Fiber scheduler_;
};

}  // namespace rwkv::kernels::cuda::emulation
