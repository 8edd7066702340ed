// Records in a snapshot's file, found by what they must be: for when the rows that say where they are have been lost.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/records/rocksdb/record_files.h"

namespace rwkv::state_store {

// [i]: where the bytes of infos[i] begin in the file of their snapshot; unset: they are not there, or not whole. Reads
// the file once, and a part of it that is something else again and again.
std::vector<absl::optional<uint64_t>> SearchFile(const RecordFiles& files, absl::Span<const v1::RecordInfo> infos);

}  // namespace rwkv::state_store
