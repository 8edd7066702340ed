#include "kernels/cuda/testing/checker.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace rwkv::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr uintptr_t kCell = 2;
constexpr int64_t kArgumentBytes = 4096;  // of a launch at most
constexpr int kMostFindings = 3;          // of a kind

}  // namespace

Checker::Checker() { emulation::SetObserver(this); }
Checker::~Checker() { emulation::SetObserver(nullptr); }

void Checker::Allow(const void* memory, int64_t bytes) { allowed_[static_cast<const char*>(memory)] = bytes; }

void Checker::OnLaunch(const emulation::Kernel& kernel) {
  kernel_ = kernel.name;
  arguments_ = static_cast<const char*>(kernel.body.arguments.get());
  launch_ = reinterpret_cast<const char*>(&kernel);
  cells_.clear();
}

void Checker::OnBlock(const emulation::Running& first) {
  const auto begin = reinterpret_cast<uintptr_t>(first.shared) / kCell;
  const auto end = reinterpret_cast<uintptr_t>(first.shared_end) / kCell;
  for (uintptr_t cell = begin; cell < end; ++cell) cells_.erase(cell);
}

bool Checker::InOrder(const Access& before, const Access& now) {
  if (before.block < 0 || (before.atomic && now.atomic)) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.block_epoch != now.block_epoch) return true;
  return before.thread / kWarp == now.thread / kWarp && before.warp_epoch != now.warp_epoch;
}

void Checker::Find(const char* kind, const void* address, const Access& other, const Access& now) {
  if (++count_[kind] > kMostFindings) return;
  std::string words = absl::StrCat(kernel_, ": ", kind, " by thread ", now.thread, " of block ", now.block);
  if (other.block >= 0) absl::StrAppend(&words, " and thread ", other.thread, " of block ", other.block);
  findings_.push_back(absl::StrCat(words, " at ", absl::Hex(reinterpret_cast<uintptr_t>(address))));
}

void Checker::OnAccess(const void* memory, int bytes, bool writes, const void*) {
  Look(memory, bytes, writes ? Kind::kWrite : Kind::kRead);
}

void Checker::OnAtomic(const void* memory, int bytes, const void*) { Look(memory, bytes, Kind::kAtomic); }

void Checker::Look(const void* memory, int bytes, Kind kind) {
  const bool writes = kind != Kind::kRead;
  const emulation::Running* const running = emulation::CurrentThread();
  if (running == nullptr) return;  // The host's code in the same file.
  const char* const address = static_cast<const char*>(memory);
  if (address >= running->stack && address < running->stack + (1 << 17)) return;
  // The launch itself, which the instrumented code unpacks.
  if (address >= arguments_ && address < arguments_ + kArgumentBytes) return;
  if (address >= launch_ && address < launch_ + sizeof(emulation::Kernel)) return;
  const Access now = {running->block, running->thread, running->block_epoch, running->warp_epoch,
                      kind == Kind::kAtomic};
  const bool shared = address >= running->shared && address + bytes <= running->shared_end;
  if (!shared) {
    if (!running->began) Find("access before BeginKernel()", memory, {}, now);
    const auto after = allowed_.upper_bound(address);
    if (after == allowed_.begin() || address + bytes > std::prev(after)->first + std::prev(after)->second) {
      Find("stray address", memory, {}, now);
      return;
    }
  }
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = first / kCell; at <= (first + static_cast<uintptr_t>(bytes) - 1) / kCell; ++at) {
    Cell& cell = cells_[at];
    if (shared && kind != Kind::kWrite && cell.write.block < 0)
      Find("shared memory read before it is written", memory, {}, now);
    if (!InOrder(cell.write, now)) Find(writes ? "write after write" : "read after write", memory, cell.write, now);
    if (writes) {
      for (const Access& read : {cell.first_read, cell.last_read}) {
        if (!InOrder(read, now)) Find("write after read", memory, read, now);
      }
      cell.write = now;
      cell.first_read = cell.last_read = {};
    } else {
      if (cell.first_read.block < 0 || InOrder(cell.first_read, now)) cell.first_read = now;
      cell.last_read = now;
    }
  }
}

}  // namespace rwkv::kernels::cuda
