#include "services/worker/client/fake_records.h"

#include "absl/strings/str_cat.h"

namespace rwkv::worker {
namespace {

// Castagnoli, bit by bit: a plain twin of the real one, for a few bytes.
uint32_t Crc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffff;
  for (const unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
  }
  return crc ^ 0xffffffff;
}

}  // namespace

absl::Status FakeRecords::Put(v1::RecordInfo& info, const std::string& bytes) {
  info.set_bytes(bytes.size());
  info.set_crc32c(Crc32c(bytes));
  if (put_) return put_(info, bytes);
  records_[{info.snapshot_id(), info.layer()}] = bytes;
  return absl::OkStatus();
}

absl::StatusOr<std::string> FakeRecords::Get(const v1::RecordInfo& info) const {
  if (!lost_.contains(info.snapshot_id())) {
    if (get_) return get_(info);
    const auto it = records_.find({info.snapshot_id(), info.layer()});
    if (it != records_.end()) return it->second;
  }
  return absl::DataLossError(absl::StrCat("snapshot ", info.snapshot_id(), " layer ", info.layer(), " is gone"));
}

void FakeRecords::Lose(const std::string& snapshot_id) { lost_.insert(snapshot_id); }

}  // namespace rwkv::worker
