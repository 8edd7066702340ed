#include "services/worker/link/nccl.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace rwkv::worker::nccl {
namespace {

struct Setting {
  const char* name;
  const char* value;
  bool overwrite;
};
constexpr Setting kSettings[] = {
    {"NCCL_COMM_BLOCKING", "0", true},  // It would overrule Config::blocking, and a call could wait for ever.
    {"NCCL_RAS_ENABLE", "0", true},     // A port that answers whoever asks.
    {"NCCL_DEBUG", "WARN", false},      // Why something failed, on standard error.
};

}  // namespace

absl::StatusOr<Nccl> Load(const std::string& name) {
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return absl::UnimplementedError(absl::StrCat("NCCL: ", dlerror()));
  Nccl nccl = {};
  std::string missing;
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
    if (function == nullptr && missing.empty()) missing = symbol;
  };
  find(nccl.get_version, "ncclGetVersion");
  find(nccl.get_unique_id, "ncclGetUniqueId");
  find(nccl.comm_init_rank_config, "ncclCommInitRankConfig");
  find(nccl.comm_get_async_error, "ncclCommGetAsyncError");
  find(nccl.comm_abort, "ncclCommAbort");
  find(nccl.group_start, "ncclGroupStart");
  find(nccl.group_end, "ncclGroupEnd");
  find(nccl.send, "ncclSend");
  find(nccl.recv, "ncclRecv");
  find(nccl.get_error_string, "ncclGetErrorString");
  find(nccl.get_last_error, "ncclGetLastError");
  if (missing.empty()) return nccl;
  dlclose(library);
  return absl::UnimplementedError(absl::StrCat("NCCL: ", name, " has no ", missing));
}

void SetEnvironment() {
  for (const Setting& setting : kSettings) setenv(setting.name, setting.value, setting.overwrite ? 1 : 0);
}

std::vector<std::string> Environment() {
  std::vector<std::string> settings;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (absl::StartsWith(*variable, "NCCL_")) settings.emplace_back(*variable);
  }
  std::sort(settings.begin(), settings.end());
  return settings;
}

}  // namespace rwkv::worker::nccl
