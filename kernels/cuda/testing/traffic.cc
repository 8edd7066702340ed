#include "kernels/cuda/testing/traffic.h"

#include <algorithm>

namespace rwkv::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr uintptr_t kSector = 32;
constexpr uintptr_t kBank = 4;
constexpr int kBanks = 32;
constexpr int kPassBytes = kBanks * 4;  // that shared memory gives at once

}  // namespace

Traffic::Traffic() { emulation::SetObserver(this); }
Traffic::~Traffic() { emulation::SetObserver(nullptr); }

void Traffic::OnLaunch(const emulation::Kernel& kernel) {
  current_ = &kernels_[kernel.name];
  arguments_ = static_cast<const char*>(kernel.body.arguments.get());
  argument_bytes_ = kernel.body.argument_bytes;
  launch_ = reinterpret_cast<const char*>(&kernel);
}

void Traffic::OnBlock(const emulation::Running&) { Flush(); }
void Traffic::OnEnd() { Flush(); }

void Traffic::OnAccess(const void* memory, int bytes, bool, const void* caller) {
  const emulation::Running* const running = emulation::CurrentThread();
  if (running == nullptr) return;  // The host's code in the same file.
  const char* const address = static_cast<const char*>(memory);
  if (address >= running->stack && address < running->stack + (1 << 17)) return;
  if (address >= arguments_ && address < arguments_ + argument_bytes_) return;
  if (address >= launch_ && address < launch_ + sizeof(emulation::Kernel)) return;
  const size_t time = times_[{caller, running->thread}]++;
  std::vector<Request>& requests = requests_[{caller, running->thread / kWarp}];
  if (requests.size() <= time) requests.resize(time + 1);
  requests[time].shared = address >= running->shared && address < running->shared_end;
  requests[time].lanes.push_back({reinterpret_cast<uintptr_t>(address), bytes});
}

void Traffic::Flush() {
  for (const auto& [place, requests] : requests_) {
    for (const Request& request : requests) Count(request, *current_);
  }
  requests_.clear();
  times_.clear();
}

void Traffic::Count(const Request& request, KernelTraffic& to) const {
  if (request.shared) {
    // Wide accesses go in passes of as many lanes as all banks can serve; within one each bank gives one word.
    const size_t lanes_of_pass = std::max<size_t>(1, kPassBytes / std::max(4, request.lanes[0].bytes));
    for (size_t begin = 0; begin < request.lanes.size(); begin += lanes_of_pass) {
      std::map<uintptr_t, std::set<uintptr_t>> words;  // by bank
      for (size_t i = begin; i < std::min(begin + lanes_of_pass, request.lanes.size()); ++i) {
        const Lane& lane = request.lanes[i];
        for (uintptr_t at = lane.address / kBank; at <= (lane.address + lane.bytes - 1) / kBank; ++at) {
          words[at % kBanks].insert(at);
        }
      }
      size_t passes = 1;
      for (const auto& [bank, of_bank] : words) passes = std::max(passes, of_bank.size());
      ++to.shared_requests;
      to.shared_conflicts += static_cast<int64_t>(passes) - 1;
    }
    return;
  }
  std::set<uintptr_t> sectors;
  std::set<uintptr_t> used;  // words, or what is narrower at its own address
  int64_t used_bytes = 0;
  for (const Lane& lane : request.lanes) {
    to.bytes += lane.bytes;
    if (lane.bytes == 16) to.wide_bytes += 16;
    if (used.insert(lane.address).second) used_bytes += lane.bytes;
    for (uintptr_t at = lane.address / kSector; at <= (lane.address + lane.bytes - 1) / kSector; ++at) {
      sectors.insert(at);
    }
  }
  to.used_bytes += used_bytes;
  to.sector_bytes += static_cast<int64_t>(sectors.size() * kSector);
}

}  // namespace rwkv::kernels::cuda
