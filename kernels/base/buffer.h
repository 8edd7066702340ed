// Memory that a device gave: owned, movable, aligned to a cache line and an AVX-512 vector.
#pragma once

#include <cstdint>
#include <memory>

namespace rwkv::kernels {

constexpr int64_t kBufferAlignment = 64;  // bytes

enum class MemoryKind : uint8_t {
  kDevice,  // The device's own. The host may not be able to touch it: operations do, and Stream::Copy.
  kPinned,  // Host memory that the device copies from and to.
};

// An empty one (also one moved from) has data() == nullptr.
class Buffer {
 public:
  using Release = void (*)(void* memory, int64_t bytes);

  Buffer() = default;
  // Takes over `memory`, which is given back by `release`.
  Buffer(void* memory, int64_t bytes, Release release) : memory_(memory, Deleter{bytes, release}) {}

  void* data() const { return memory_.get(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }
  // Gives the memory up without giving it back: something that never ends may still use it.
  void* Leak() { return memory_.release(); }
  int64_t size_in_bytes() const { return memory_ == nullptr ? 0 : memory_.get_deleter().bytes; }

 private:
  struct Deleter {
    int64_t bytes;
    Release release;
    void operator()(void* memory) const { release(memory, bytes); }
  };
  std::unique_ptr<void, Deleter> memory_;
};

}  // namespace rwkv::kernels
