// Records as objects of a bucket of S3, for any number of store processes. Laws: records/record_store.h.
//
// An object's name says what it must be, so that checking and sweeping read no states:
//   PREFIX SNAPSHOT / LAYER - BYTES - CRC32C        layer and bytes decimal, the checksum in hex
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/common/metrics.h"
#include "services/state_store/records/record_store.h"
#include "services/state_store/records/s3/s3_client.h"

namespace rwkv::state_store {

class S3RecordStore final : public RecordStore {
 public:
  // `prefix`: of all names, empty or ending in '/'. Asks the bucket once, so that what is wrong with it shows at start.
  // `metrics` outlives the store.
  static absl::StatusOr<std::unique_ptr<S3RecordStore>> Create(std::unique_ptr<S3Client> client, std::string prefix,
                                                               common::Metrics* metrics);

  absl::Status Put(const v1::RecordInfo& info, absl::Span<const char> data) override;
  absl::Status Read(const v1::RecordInfo& info, absl::Span<char> to) override;
  absl::Status Check(const v1::RecordInfo& info) override;
  absl::Status MakeDurable() override { return absl::OkStatus(); }  // Each Put was.
  absl::Status Delete(const std::string& snapshot_id) override;
  absl::Status ForEach(absl::FunctionRef<void(const Stored&)> visit) override;
  // An estimate: as the last ForEach() found it, and what this process did since.
  int64_t bytes() const override { return bytes_.load(std::memory_order_relaxed); }

 private:
  S3RecordStore(std::unique_ptr<S3Client> client, std::string prefix, common::Metrics* metrics);

  std::string LayerPrefix(const v1::RecordInfo& info) const;
  std::string Key(const v1::RecordInfo& info) const;
  void CountBytes(int64_t delta);

  const std::unique_ptr<S3Client> client_;
  const std::string prefix_;
  std::atomic<int64_t> bytes_{0};
  prometheus::Gauge& bytes_gauge_;
  prometheus::Counter& written_bytes_total_;
  prometheus::Counter& read_bytes_total_;
  prometheus::Counter& corrupt_total_;
};

}  // namespace rwkv::state_store
