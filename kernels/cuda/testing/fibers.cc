#include "kernels/cuda/testing/fibers.h"

#include <sys/mman.h>

#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/common_interface_defs.h>
#define RWKV_ADDRESS_SANITIZER 1
#endif
#if __has_feature(thread_sanitizer)
#include <sanitizer/tsan_interface.h>
#define RWKV_THREAD_SANITIZER 1
#endif
#endif

namespace rwkv::kernels::cuda::emulation {
namespace {

namespace context = boost::context::detail;

constexpr int64_t kPage = 4096;
constexpr int64_t kStackBytes = 128 * 1024;
// Equal page offsets would make all stacks share a few sets of the cache: three times slower.
constexpr int64_t kStagger = 5 * 64;

size_t SizeOf(const Fibers::Stack& stack) { return static_cast<size_t>(stack.end - stack.begin); }

}  // namespace

Fibers::Fibers(int count) : fibers_(static_cast<size_t>(count)) {
  void* const memory = mmap(nullptr, static_cast<size_t>(count * kStackBytes), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  for (int i = 0; i < count; ++i) {
    char* const begin = static_cast<char*>(memory) + i * kStackBytes;
    mprotect(begin, kPage, PROT_NONE);
    fibers_[i].stack = {begin + kPage, begin + kStackBytes - (i % 64) * kStagger};
#ifdef RWKV_THREAD_SANITIZER
    fibers_[i].tsan_fiber = __tsan_create_fiber(0);
#endif
  }
}

void Fibers::Start(int fiber, void (*run)()) {
  Fiber& it = fibers_[fiber];
  it.run = run;
  it.context = context::make_fcontext(const_cast<char*>(it.stack.end), SizeOf(it.stack), Enter);
}

void Fibers::Enter(context::transfer_t from) {
  auto* const self = static_cast<Fibers*>(from.data);
  self->scheduler_.context = from.fctx;
#ifdef RWKV_ADDRESS_SANITIZER
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, reinterpret_cast<const void**>(&self->scheduler_.stack.begin), &bytes);
  self->scheduler_.stack.end = self->scheduler_.stack.begin + bytes;
#endif
  self->current_->run();
  self->BackToScheduler(true);
  std::abort();  // Nobody resumes a fiber that has ended.
}

void Fibers::Resume(int fiber) {
  Fiber& it = fibers_[fiber];
  current_ = &it;
#ifdef RWKV_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&scheduler_.fake_stack, it.stack.begin, SizeOf(it.stack));
#endif
#ifdef RWKV_THREAD_SANITIZER
  scheduler_.tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(it.tsan_fiber, 0);
#endif
  const context::transfer_t from = context::jump_fcontext(it.context, this);
  it.context = from.fctx;
#ifdef RWKV_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(scheduler_.fake_stack, nullptr, nullptr);
#endif
  current_ = nullptr;
}

void Fibers::BackToScheduler(bool for_good) {
  Fiber& it = *current_;
#ifdef RWKV_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(for_good ? nullptr : &it.fake_stack, scheduler_.stack.begin, SizeOf(scheduler_.stack));
#endif
#ifdef RWKV_THREAD_SANITIZER
  __tsan_switch_to_fiber(scheduler_.tsan_fiber, 0);
#endif
  const context::transfer_t from = context::jump_fcontext(scheduler_.context, nullptr);
  scheduler_.context = from.fctx;
#ifdef RWKV_ADDRESS_SANITIZER
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(it.fake_stack, reinterpret_cast<const void**>(&scheduler_.stack.begin), &bytes);
  scheduler_.stack.end = scheduler_.stack.begin + bytes;
#endif
  (void)it;
  (void)for_good;
}

}  // namespace rwkv::kernels::cuda::emulation
