// Rows of tables that the catalog's list of files (MANIFEST) does not name, or that a start has dropped for that.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "services/common/metrics.h"
#include "services/state_store/offline/survey.h"
#include "services/state_store/rocksdb/ack_journal.h"

namespace rwkv::state_store {

// If the tables in `scratch` and those that it has kept make good all that the rows of `survey` lack of what was
// acknowledged, takes it from them, deletions too; of a row the newest change counts, by sequence number. Else takes
// nothing, since of rows that belong together some would be old and others new. Nor does it take what was not
// acknowledged: a table may be left over of rows that were deleted long ago, while the table that said so is gone.
// After OpenScratch(), when that database is closed.
void TakeKeptRows(const std::string& scratch, const AcknowledgedRows& acknowledged, common::Metrics* metrics,
                  Survey& survey, std::map<std::string, uint32_t>& seals);

}  // namespace rwkv::state_store
