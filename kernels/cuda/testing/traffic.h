// What kernels that are built for the checker ask of memory: for each, how wide its accesses are, what share of the
// 32-byte sectors that its warps touch they use, and how often shared memory makes lanes wait for each other. Requests,
// not what caches make of them. The k-th time that each lane of a warp comes to a place in the code is one request of
// the warp.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda {

struct KernelTraffic {
  int64_t bytes = 0;         // of device memory, read and written by lanes
  int64_t wide_bytes = 0;    // of these, by accesses of 16 bytes
  int64_t used_bytes = 0;    // different ones of each warp's request
  int64_t sector_bytes = 0;  // of the sectors that hold them
  int64_t shared_requests = 0;
  int64_t shared_conflicts = 0;  // passes beyond the one that a request needs
};

// While one lives it watches the process's launches. One at a time, and no Checker beside it.
class Traffic final : public emulation::Observer {
 public:
  Traffic();
  ~Traffic() override;

  const std::map<std::string, KernelTraffic>& kernels() const { return kernels_; }  // by name

  void OnLaunch(const emulation::Kernel& kernel) override;
  void OnBlock(const emulation::Running& first) override;
  void OnEnd() override;
  void OnAccess(const void* address, int bytes, bool writes, const void* caller) override;

 private:
  struct Lane {
    uintptr_t address;
    int bytes;
  };
  struct Request {
    bool shared = false;
    std::vector<Lane> lanes;
  };
  using Place = std::pair<const void*, int>;  // code, warp

  void Flush();
  void Count(const Request& request, KernelTraffic& to) const;

  std::map<std::string, KernelTraffic> kernels_;
  KernelTraffic* current_ = nullptr;
  const char* launch_ = nullptr;
  const char* arguments_ = nullptr;
  int64_t argument_bytes_ = 0;
  std::map<Place, std::vector<Request>> requests_;       // of the block
  std::map<std::pair<const void*, int>, size_t> times_;  // by code and thread
};

}  // namespace rwkv::kernels::cuda
