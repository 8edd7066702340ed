// A model in several files, as trainers and converters cut large ones.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace rwkv::checkpoint {

constexpr int kMaxShards = 1024;
constexpr int64_t kMaxIndexBytes = 64 << 20;

// The files that make up one checkpoint, in order.
struct Shards {
  std::vector<std::string> files;
  // What an index says that each file holds, parallel to files; empty without an index.
  std::vector<std::set<std::string>> tensors;
};

// `path` is one of
//   a file                                  that file; with a name that ends in -00001-of-00003.gguf (or another
//                                           number), all the parts that lie beside it
//   NAME.safetensors.index.json             the files that it names, which lie beside it (also NAME.bin.index.json)
//   a folder                                its index, or else its only checkpoint
//   kNotFound: no such path, or a part of it is missing; named. kPermissionDenied: not readable.
//   kInvalidArgument: an index that is none or names files elsewhere; a folder without a checkpoint, or with several.
absl::StatusOr<Shards> FindShards(const std::string& path);

}  // namespace rwkv::checkpoint
