// Folders that are still there after a crash of the machine: the name of a file or folder is as durable as the last
// fsync of the folder that it is in, whatever was done for its content.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "rocksdb/env.h"

namespace rwkv::state_store {

// Makes `path` and its parents, durably. Errors begin with `name`; kFailedPrecondition: one of them is a file.
absl::Status MakeDirectories(rocksdb::Env& env, const std::string& path, const std::string& name);

// What was made, renamed and removed in it before is durable.
absl::Status SyncDirectory(rocksdb::Env& env, const std::string& path);

}  // namespace rwkv::state_store
