// Where a FakePipeline keeps what it saves.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/state_store.pb.h"

namespace rwkv::worker {

// Not thread-safe.
class FakeRecords {
 public:
  using PutRecord = std::function<absl::Status(const v1::RecordInfo& info, const std::string& bytes)>;
  using GetRecord = std::function<absl::StatusOr<std::string>(const v1::RecordInfo& info)>;

  // Written and read through these where they are set.
  FakeRecords(PutRecord put, GetRecord get) : put_(std::move(put)), get_(std::move(get)) {}

  // Sets the size and the checksum of `info`.
  absl::Status Put(v1::RecordInfo& info, const std::string& bytes);
  // kDataLoss: it is not there.
  absl::StatusOr<std::string> Get(const v1::RecordInfo& info) const;
  // Nobody reads the snapshot any more.
  void Lose(const std::string& snapshot_id);

 private:
  const PutRecord put_;
  const GetRecord get_;
  absl::flat_hash_map<std::pair<std::string, int>, std::string> records_;  // By snapshot and layer.
  absl::flat_hash_set<std::string> lost_;
};

}  // namespace rwkv::worker
