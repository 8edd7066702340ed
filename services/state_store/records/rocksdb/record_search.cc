#include "services/state_store/records/rocksdb/record_search.h"

#include <algorithm>
#include <cstddef>

#include "services/state_store/client/crc32c.h"
#include "services/state_store/records/record_memory.h"

namespace rwkv::state_store {

std::vector<absl::optional<uint64_t>> SearchFile(const RecordFiles& files, absl::Span<const v1::RecordInfo> infos) {
  std::vector<absl::optional<uint64_t>> found(infos.size());
  uint64_t largest = 0;
  for (const v1::RecordInfo& info : infos) largest = std::max(largest, info.bytes());
  const size_t room = WholeBlocks(largest);
  const RecordMemory memory = NewRecordMemory(room);
  for (uint64_t at = 0;;) {
    bool fits = false, matches = false;
    uint64_t bytes = 0;  // That have been read from `at` on.
    uint32_t crc = 0;    // Theirs.
    for (size_t i = 0; i < infos.size() && !matches; ++i) {
      const v1::RecordInfo& info = infos[i];
      if (found[i].has_value() || !files.Holds(info.snapshot_id(), at + info.bytes())) continue;
      fits = true;
      if (bytes != info.bytes()) {
        bytes = 0;
        if (!files.Read(info.snapshot_id(), at, info.bytes(), absl::MakeSpan(memory.get(), room)).ok()) continue;
        bytes = info.bytes();
        crc = Crc32c(absl::MakeConstSpan(memory.get(), bytes));
      }
      if (crc != info.crc32c()) continue;
      found[i] = at;
      matches = true;
    }
    if (!fits) return found;
    // The next one follows at once, or at the next whole block (record_files.h).
    at = matches ? at + bytes : WholeBlocks(at + 1);
  }
}

}  // namespace rwkv::state_store
