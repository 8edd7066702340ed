#include "services/checkpoint/shards.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {
namespace {

constexpr absl::string_view kIndexEnding = ".index.json";
constexpr absl::string_view kEndings[] = {".safetensors", ".pth", ".pt", ".st", ".gguf", ".bin"};
constexpr size_t kDigits = 5;  // Of a part's number and of their count.

absl::Status Failed(const std::string& path, const std::error_code& error) {
  return absl::ErrnoToStatus(error.value(), absl::StrCat("cannot open ", path));
}

bool HasCheckpointEnding(absl::string_view name) {
  return std::any_of(std::begin(kEndings), std::end(kEndings),
                     [name](absl::string_view ending) { return absl::EndsWith(name, ending); });
}

// All parts if `path` is named like one, else itself.
absl::StatusOr<Shards> PartsOfGguf(const std::string& path) {
  absl::string_view rest = path;
  constexpr absl::string_view kOf = "-of-";
  constexpr size_t kTail = 1 + kDigits + kOf.size() + kDigits;  // "-00001-of-00003"
  int part = 0, count = 0;
  if (!absl::ConsumeSuffix(&rest, ".gguf") || rest.size() < kTail || rest[rest.size() - kTail] != '-' ||
      rest.substr(rest.size() - kDigits - kOf.size(), kOf.size()) != kOf ||
      !absl::SimpleAtoi(rest.substr(rest.size() - kTail + 1, kDigits), &part) ||
      !absl::SimpleAtoi(rest.substr(rest.size() - kDigits), &count) || part < 1 || part > count) {
    return Shards{{path}, {}};
  }
  if (count > kMaxShards) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is one of ", count, " parts; at most ", kMaxShards, " go"));
  }
  Shards shards;
  for (int i = 1; i <= count; ++i) {
    shards.files.push_back(absl::StrFormat("%s-%05d-of-%05d.gguf", rest.substr(0, rest.size() - kTail), i, count));
    std::error_code error;
    if (!std::filesystem::exists(shards.files.back(), error)) {
      return absl::NotFoundError(absl::StrCat(path, " is part ", part, " of ", count, ", but there is no ",
                                              shards.files.back()));
    }
  }
  return shards;
}

absl::StatusOr<Shards> ReadIndex(const std::string& path) {
  const auto bad = [&path](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
  };
  std::error_code error;
  const uintmax_t bytes = std::filesystem::file_size(path, error);
  if (error) return Failed(path, error);
  if (bytes > static_cast<uintmax_t>(kMaxIndexBytes)) {
    return bad(absl::StrCat("an index of ", bytes, " bytes; at most ", kMaxIndexBytes, " go"));
  }
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) return absl::PermissionDeniedError(absl::StrCat("cannot read ", path));
  const nlohmann::json json = nlohmann::json::parse(text.str(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
    return bad("is no index of a model's files: it has no object \"weight_map\"");
  }
  std::map<std::string, std::set<std::string>> tensors_of;
  for (const auto& [tensor, shard] : json["weight_map"].items()) {
    if (!shard.is_string()) return bad(absl::StrCat("tensor ", Quoted(tensor), " is in no file"));
    const std::string name = shard.get<std::string>();
    // Of the index's own folder, and nothing else: an index may come from anybody.
    if (name.empty() || name.find('/') != std::string::npos || name.find('\0') != std::string::npos || name == "." ||
        name == "..") {
      return bad(absl::StrCat("tensor ", Quoted(tensor), " is in ", Quoted(name), ", which is no file beside it"));
    }
    tensors_of[name].insert(tensor);
  }
  if (tensors_of.empty()) return bad("names no tensor");
  if (tensors_of.size() > kMaxShards) {
    return bad(absl::StrCat("names ", tensors_of.size(), " files; at most ", kMaxShards, " go"));
  }
  Shards shards;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  for (auto& [name, tensors] : tensors_of) {
    shards.files.push_back((folder / name).string());
    shards.tensors.push_back(std::move(tensors));
    if (!std::filesystem::exists(shards.files.back(), error)) {
      return absl::NotFoundError(absl::StrCat(path, " names ", Quoted(name), ", but there is no such file"));
    }
  }
  return shards;
}

absl::StatusOr<Shards> SearchFolder(const std::string& path) {
  std::error_code error;
  std::vector<std::string> indexes, checkpoints;
  for (std::filesystem::directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (absl::EndsWith(name, kIndexEnding)) indexes.push_back(entry->path().string());
    if (HasCheckpointEnding(name)) checkpoints.push_back(entry->path().string());
  }
  if (error) return Failed(path, error);
  std::sort(indexes.begin(), indexes.end());
  std::sort(checkpoints.begin(), checkpoints.end());
  // Both formats of one model: safetensors has no code in it.
  if (indexes.size() > 1) {
    indexes.erase(std::remove_if(indexes.begin(), indexes.end(),
                                 [](const std::string& index) {
                                   return !absl::EndsWith(index, absl::StrCat(".safetensors", kIndexEnding));
                                 }),
                  indexes.end());
  }
  if (indexes.size() == 1) return ReadIndex(indexes[0]);
  if (indexes.empty() && !checkpoints.empty()) {
    RWKV_ASSIGN_OR_RETURN(Shards shards, PartsOfGguf(checkpoints[0]));
    if (shards.files == checkpoints) return shards;
  }
  const std::vector<std::string>& several = indexes.empty() ? checkpoints : indexes;
  if (several.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is a folder without a checkpoint (", absl::StrJoin(kEndings, ", "), ") or an index"));
  }
  return absl::InvalidArgumentError(absl::StrCat(path, " is a folder with several checkpoints, name one: ",
                                                 absl::StrJoin(several.begin(),
                                                               several.begin() + std::min<size_t>(several.size(), 4),
                                                               ", "),
                                                 several.size() > 4 ? ", ..." : ""));
}

}  // namespace

absl::StatusOr<Shards> FindShards(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return SearchFolder(path);
  if (absl::EndsWith(path, kIndexEnding)) return ReadIndex(path);
  return PartsOfGguf(path);
}

}  // namespace rwkv::checkpoint
