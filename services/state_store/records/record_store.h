// The large half of the state store: state records by snapshot and layer, immutable and checksummed.
//
// An implementation keeps these laws (services/state_store/records/rocksdb is the embedded one; an object store fits):
// - Put is all or nothing: no record is ever there in part. It need not be durable when it returns; MakeDurable() makes
//   every record durable that was put before it.
// - A record never changes. Read gives back the very bytes that were put, or an error; it never serves others.
// - It knows nothing of manifests: who commits, drops and sweeps is StateStore (services/state_store/state_store.h).
//
// A record is named by (snapshot_id, layer); a RecordInfo adds what it must be. Arguments are checked for form by
// rpc/validation.h. kResourceExhausted: the disk is full. kUnavailable: the storage is away. Every implementation is
// thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "rwkv/v1/state_store.pb.h"

namespace rwkv::state_store {

class RecordStore {
 public:
  virtual ~RecordStore() = default;

  // kDataLoss: `data` has not the length or the CRC32C that `info` says. kAlreadyExists: the record is there and
  // differs; if it is equal, nothing changes. `data`, and `to` below, are best in memory of record_memory.h: places that
  // follow each other, each of whole blocks, of which the rest behind a record may be stored with it.
  virtual absl::Status Put(const v1::RecordInfo& info, absl::Span<const char> data) = 0;
  // Several records of one snapshot, with the data of each. After an error some of them may be there.
  virtual absl::Status PutAll(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<const char>> data) {
    for (size_t i = 0; i < infos.size(); ++i) {
      const absl::Status status = Put(infos[i], data[i]);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
  // Fills the first info.bytes() of `to`; anything may be in the rest, and after an error in all of it. kNotFound: no
  // such record. kDataLoss: what is stored differs from `info`, or is corrupt.
  virtual absl::Status Read(const v1::RecordInfo& info, absl::Span<char> to) = 0;
  // Several records of one snapshot, with a place for each. Best are places that follow each other, each of whole blocks
  // (record_memory.h).
  virtual absl::Status ReadAll(absl::Span<const v1::RecordInfo> infos, absl::Span<const absl::Span<char>> to) {
    for (size_t i = 0; i < infos.size(); ++i) {
      const absl::Status status = Read(infos[i], to[i]);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
  // The same of one, in a string.
  absl::StatusOr<std::string> Get(const v1::RecordInfo& info) {
    std::string data(info.bytes(), '\0');
    const absl::Status status = Read(info, absl::MakeSpan(data));
    if (!status.ok()) return status;
    return data;
  }
  // kDataLoss: no such record, or it was put with another length or checksum. Does not read its bytes.
  virtual absl::Status Check(const v1::RecordInfo& info) = 0;
  virtual absl::Status MakeDurable() = 0;
  // Begins with it, if so many records of the snapshot wait for it, and returns at once: MakeDurable() will be asked for
  // soon. A hint.
  virtual void MakeDurableSoon(const std::string& /*snapshot_id*/, size_t /*records*/) {}
  // Only of those that this manifest names, which are found again with its help, if need be: it is committed next.
  virtual absl::Status MakeDurable(const v1::SnapshotManifest&) { return MakeDurable(); }
  // All layers of a snapshot. Deleting what is not there is fine.
  virtual absl::Status Delete(const std::string& snapshot_id) = 0;

  struct Stored {
    std::string snapshot_id;
    absl::Time newest_put;  // When its last record came.
    uint64_t bytes = 0;
  };
  // Every snapshot with at least one record, by id. Sees at least what was there at the call.
  virtual absl::Status ForEach(absl::FunctionRef<void(const Stored&)> visit) = 0;

  // All records together, without the store's own overhead.
  virtual int64_t bytes() const = 0;
};

}  // namespace rwkv::state_store
