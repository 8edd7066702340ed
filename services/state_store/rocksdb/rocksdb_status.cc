#include "services/state_store/rocksdb/rocksdb_status.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"

namespace rwkv::state_store {

absl::Status FromRocksdbStatus(const rocksdb::Status& status, absl::string_view context) {
  if (status.ok()) return absl::OkStatus();
  std::string message = absl::StrCat(context, ": ", status.ToString());
  std::replace(message.begin(), message.end(), '\n', ' ');
  if (status.IsNoSpace()) return absl::ResourceExhaustedError(message);
  switch (status.code()) {
    case rocksdb::Status::kNotFound:
      return absl::NotFoundError(message);
    case rocksdb::Status::kCorruption:
      return absl::DataLossError(message);
    case rocksdb::Status::kInvalidArgument:
    case rocksdb::Status::kNotSupported:
      return absl::InternalError(message);
    default:
      return absl::UnavailableError(message);
  }
}

}  // namespace rwkv::state_store
