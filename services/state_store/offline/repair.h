// Check, repair and move of an embedded store that is stopped. Reports go to `say`, a line at a time.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "services/state_store/shared_state_store.h"

namespace rwkv::state_store {

using Say = std::function<void(const std::string& line)>;

// Check and repair hold the folder's lock all the time. kUnavailable: its store runs, or another checks or repairs it.

// Every row, manifest and record; which sessions are touched; counts. kDataLoss: something is.
absl::Status CheckStore(const std::string& data_dir, const Say& say);

// Saves the sessions that are whole, names those that are not, and moves the damaged files to DIR/damaged-N. A session
// that is whole but older than what was acknowledged is kept, and answers DATA_LOSS until it is rewound or deleted.
absl::Status RepairStore(const std::string& data_dir, const Say& say);

// Copies all sessions and states to PostgreSQL and S3. kFailedPrecondition: the catalog there has sessions already.
// Leaves the folder as it is. Doing it again after a failure is fine once the rows there are removed.
absl::Status MoveStore(const std::string& data_dir, const SharedStateStore::Options& to, const Say& say);

}  // namespace rwkv::state_store
