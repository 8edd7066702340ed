// Sees every load and store of kernels that are built with clang's thread-sanitizer instrumentation, which calls this
// in place of the sanitizer's own library: races between threads of a launch, shared memory read before it is written,
// and addresses that are neither stack, shared memory nor what the test has allowed. Two accesses of one launch are in
// order if their thread is the same, or their block is and a barrier lies between them, or their warp and a SyncWarp,
// or if both are atomic.
// Copies that clang makes with memcpy are not seen; device.cuh's wide accesses report themselves.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda {

// While one lives it watches the process's launches. One at a time.
class Checker final : public emulation::Observer {
 public:
  Checker();
  ~Checker() override;

  // Memory that kernels may touch.
  void Allow(const void* memory, int64_t bytes);

  // What was found, in words: the first three of each kind.
  const std::vector<std::string>& findings() const { return findings_; }

  void OnLaunch(const emulation::Kernel& kernel) override;
  void OnBlock(const emulation::Running& first) override;
  void OnEnd() override {}
  void OnAccess(const void* address, int bytes, bool writes, const void* caller) override;
  void OnAtomic(const void* address, int bytes, const void* caller) override;

 private:
  enum class Kind { kRead, kWrite, kAtomic };
  struct Access {
    int64_t block = -1;
    int thread = 0;
    uint32_t block_epoch = 0;
    uint32_t warp_epoch = 0;
    bool atomic = false;
  };
  // Of two bytes. Of several readers the first and the last are kept.
  struct Cell {
    Access write;
    Access first_read;
    Access last_read;
  };

  void Look(const void* memory, int bytes, Kind kind);
  static bool InOrder(const Access& before, const Access& now);
  void Find(const char* kind, const void* address, const Access& other, const Access& now);

  std::map<const char*, int64_t> allowed_;
  std::unordered_map<uintptr_t, Cell> cells_;
  std::string kernel_;
  const char* launch_ = nullptr;
  const char* arguments_ = nullptr;
  std::map<std::string, int> count_;  // By kind.
  std::vector<std::string> findings_;
};

}  // namespace rwkv::kernels::cuda
