// A copy of a stopped store's folder to try things on: large files are links, which RocksDB never writes to.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/common/metrics.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

// Makes DIR/.survey. kUnavailable: the store runs. kNotFound: there is none.
absl::StatusOr<std::string> CopyToScratch(const std::string& data_dir);

// Opens it by whatever means; *why: what keeps a store from starting on it, empty if nothing does.
absl::StatusOr<std::unique_ptr<Database>> OpenScratch(const std::string& scratch, common::Metrics* metrics,
                                                      std::string* why);

}  // namespace rwkv::state_store
