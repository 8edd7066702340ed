// Memory, control, and what threads do together.
#include "kernels/cuda/testing/ptx_instructions.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/ptx_table.h"

namespace rwkv::kernels::cuda::ptx {
namespace {

emulation::Site SiteOf(const Instruction& instruction) { return {"the PTX", instruction.line}; }

enum class Space { kGlobal, kShared, kParameters };

template <Space kSpace>
char* Place(const Thread& thread, uint64_t address, int64_t bytes, const char* does) {
  if constexpr (kSpace == Space::kGlobal) {
    auto* const memory = reinterpret_cast<char*>(address);
    emulation::CheckAccess(memory, static_cast<int>(bytes), does);
    return memory;
  } else if constexpr (kSpace == Space::kShared) {
    const auto offset = static_cast<int64_t>(static_cast<int32_t>(address));
    if (offset < 0) emulation::Forbid("reaches before the block's shared memory");
    char* const memory = static_cast<char*>(emulation::BlockShared(static_cast<size_t>(offset + bytes))) + offset;
    emulation::CheckAccess(memory, static_cast<int>(bytes), does);
    return memory;
  } else {
    if (address + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(thread.parameter_bytes)) {
      emulation::Forbid("reads behind its parameters");
    }
    return const_cast<char*>(thread.parameters) + address;
  }
}

// A number with a sign fills its register, whose size the text does not say.
template <Space kSpace, typename T>
void Load(Thread& thread, const Instruction& i) {
  using Widest = std::conditional_t<std::is_signed_v<T> && std::is_integral_v<T>, int64_t, T>;
  const uint64_t address = In<uint64_t>(thread, i, i.count) + static_cast<uint64_t>(i.offset);
  const char* const from = Place<kSpace>(thread, address, i.count * static_cast<int64_t>(sizeof(T)), "reads ");
  for (int element = 0; element < i.count; ++element) {
    T value;
    std::memcpy(&value, from + element * sizeof(T), sizeof(value));
    Out<Widest>(thread, i, element, static_cast<Widest>(value));
  }
}
template <Space kSpace, typename T>
void Store(Thread& thread, const Instruction& i) {
  const uint64_t address = In<uint64_t>(thread, i, 0) + static_cast<uint64_t>(i.offset);
  char* const to = Place<kSpace>(thread, address, i.count * static_cast<int64_t>(sizeof(T)), "writes ");
  for (int element = 0; element < i.count; ++element) {
    const T value = In<T>(thread, i, element + 1);
    std::memcpy(to + element * sizeof(T), &value, sizeof(value));
  }
}
void AddAtomically(Thread& thread, const Instruction& i) {
  const uint64_t address = In<uint64_t>(thread, i, 1) + static_cast<uint64_t>(i.offset);
  auto* const to = reinterpret_cast<uint64_t*>(Place<Space::kShared>(thread, address, 8, "adds to "));
  const auto value = In<uint64_t>(thread, i, 2);
  const uint64_t old = *to;
  emulation::AtomicAdd(to, value, nullptr);
  Out<uint64_t>(thread, i, 0, old);
}
void PrefetchLine(Thread& thread, const Instruction& i) {
  emulation::CheckPrefetch(reinterpret_cast<const void*>(In<uint64_t>(thread, i, 0)));
}

// Control, and what threads do together.

void Branch(Thread& thread, const Instruction& i) { thread.next = i.target; }
void Return(Thread& thread, const Instruction&) { thread.next = -1; }
void Nothing(Thread&, const Instruction&) {}
void WaitForTheKernelBefore(Thread&, const Instruction&) { emulation::BeginKernel(); }
void SyncBlock(Thread& thread, const Instruction& i) {
  if (In<uint32_t>(thread, i, 0) != 0) emulation::Forbid("comes to another barrier than 0");
  emulation::SyncBlock(SiteOf(i));
}
void SyncWarp(Thread& thread, const Instruction& i) {
  if (In<uint32_t>(thread, i, 0) != 0xffffffffu) emulation::Forbid("waits for a part of its warp");
  emulation::SyncWarp(SiteOf(i));
}
void Shuffle(Thread& thread, const Instruction& i) {
  // Of the whole warp: no segments, all lanes.
  if (In<uint32_t>(thread, i, 4) != 31 || In<uint32_t>(thread, i, 5) != 0xffffffffu) {
    emulation::Forbid("exchanges with a part of its warp");
  }
  const int mask = In<int32_t>(thread, i, 3);
  if (mask < 0 || mask > 31) emulation::Forbid("exchanges with a lane that is none");
  Out<float>(thread, i, 0, emulation::ShuffleXor(In<float>(thread, i, 2), mask, SiteOf(i)));
  Out<uint64_t>(thread, i, 1, 1);
}

using Mma = void (*)(float* c, const uint32_t* a, const uint32_t* b, int steps, emulation::Site site);
template <Mma kMma>
void MultiplyMatrices(Thread& thread, const Instruction& i) {
  float c[4];
  uint32_t a[4], b[2];
  for (int e = 0; e < 4; ++e) a[e] = In<uint32_t>(thread, i, 4 + e), c[e] = In<float>(thread, i, 10 + e);
  for (int e = 0; e < 2; ++e) b[e] = In<uint32_t>(thread, i, 8 + e);
  kMma(c, a, b, 1, SiteOf(i));
  for (int e = 0; e < 4; ++e) Out<float>(thread, i, e, c[e]);
}
void MultiplyBytes(Thread& thread, const Instruction& i) {
  int32_t c[4];
  uint32_t a[4], b[2];
  for (int e = 0; e < 4; ++e) a[e] = In<uint32_t>(thread, i, 4 + e), c[e] = In<int32_t>(thread, i, 10 + e);
  for (int e = 0; e < 2; ++e) b[e] = In<uint32_t>(thread, i, 8 + e);
  emulation::MmaInt8(c, a, b, SiteOf(i));
  for (int e = 0; e < 4; ++e) Out<int32_t>(thread, i, e, c[e]);
}

template <Space kSpace, typename T>
void AddAccess(Table& table, const std::string& space, const std::string& type) {
  table[absl::StrCat("ld.", space, ".", type)] = {Load<kSpace, T>, kOfVector};
  if constexpr (kSpace != Space::kParameters)
    table[absl::StrCat("st.", space, ".", type)] = {Store<kSpace, T>, kOfVector};
}
template <Space kSpace>
void AddAccesses(Table& table, const std::string& space) {
  AddAccess<kSpace, uint8_t>(table, space, "u8");
  AddAccess<kSpace, int8_t>(table, space, "s8");
  AddAccess<kSpace, uint16_t>(table, space, "u16");
  AddAccess<kSpace, int16_t>(table, space, "s16");
  AddAccess<kSpace, uint32_t>(table, space, "u32");
  AddAccess<kSpace, int32_t>(table, space, "s32");
  AddAccess<kSpace, uint64_t>(table, space, "u64");
  AddAccess<kSpace, float>(table, space, "f32");
  AddAccess<kSpace, double>(table, space, "f64");
}

Table MakeTable() {
  Table table;
  AddArithmetic(table);
  AddAccesses<Space::kGlobal>(table, "global");
  AddAccesses<Space::kShared>(table, "shared");
  AddAccesses<Space::kParameters>(table, "param");
  table["atom.shared.add.u64"] = {AddAtomically, 3};
  table["prefetch.global.L2"] = {PrefetchLine, 1};
  table["bra"] = table["bra.uni"] = {Branch, 0};
  table["ret"] = {Return, 0};
  table["griddepcontrol.wait"] = {WaitForTheKernelBefore, 0};
  table["griddepcontrol.launch_dependents"] = {Nothing, 0};
  table["bar.sync"] = {SyncBlock, 1};
  table["bar.warp.sync"] = {SyncWarp, 1};
  table["shfl.sync.bfly.b32"] = {Shuffle, 6};
  table["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {MultiplyMatrices<emulation::MmaBf16>, 14};
  table["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = {MultiplyMatrices<emulation::MmaHalf>, 14};
  table["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"] = {MultiplyBytes, 14};
  return table;
}

}  // namespace

absl::Status SetMeaning(absl::string_view name, Instruction& instruction, int& operands) {
  static const auto* const table = new Table(MakeTable());
  // Accesses may be vectors, and say which cache they go past.
  std::string plain;
  for (const absl::string_view part : absl::StrSplit(name, '.')) {
    const bool of_access = absl::StartsWith(name, "ld.") || absl::StartsWith(name, "st.");
    if (of_access && (part == "v2" || part == "v4")) {
      instruction.count = part == "v2" ? 2 : 4;
    } else if (!of_access || part != "cs") {
      absl::StrAppend(&plain, plain.empty() ? "" : ".", part);
    }
  }
  const auto it = table->find(plain);
  if (it == table->end()) return absl::UnimplementedError(absl::StrCat("instruction ", name));
  instruction.run = it->second.run;
  operands = it->second.operands == kOfVector ? 1 + instruction.count : it->second.operands;
  return absl::OkStatus();
}

}  // namespace rwkv::kernels::cuda::ptx
