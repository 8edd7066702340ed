// The functions of NCCL that links use, as a table: those of the library that is found when the process starts, and for
// tests a fake (testing/fake_nccl.h). The library is no part of the build and its header is not included: names, numbers
// and layouts here are its ABI, which nccl_test holds against the header where there is one.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace rwkv::worker::nccl {

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

constexpr int kFloat32 = 7;  // ncclDataType_t

struct UniqueId {
  char internal[128];
};

using Communicator = struct ncclComm*;
using StreamHandle = void*;  // cudaStream_t

// ncclConfig_t as of 2.17. Newer libraries go by `size` and `version`, and take defaults for what came later.
struct Config {
  size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21700;
  int blocking = 0;  // Every call returns at once; whoever waits has limits of his own.
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
};

constexpr int kOldestVersion = 21800;  // 2.18: aborting a communicator that is not ready yet.

struct Nccl {
  Result (*get_version)(int* version);
  Result (*get_unique_id)(UniqueId* id);
  Result (*comm_init_rank_config)(Communicator* communicator, int ranks, UniqueId id, int rank, Config* config);
  Result (*comm_get_async_error)(Communicator communicator, Result* error);
  Result (*comm_abort)(Communicator communicator);
  Result (*group_start)();
  Result (*group_end)();
  Result (*send)(const void* buffer, size_t count, int type, int peer, Communicator communicator, StreamHandle stream);
  Result (*recv)(void* buffer, size_t count, int type, int peer, Communicator communicator, StreamHandle stream);
  const char* (*get_error_string)(Result result);
  const char* (*get_last_error)(Communicator communicator);
};

// The table of the shared library `name`, which stays loaded. kUnimplemented: it is not there, or lacks a function;
// says what.
absl::StatusOr<Nccl> Load(const std::string& name);

// What the dynamic linker finds: libnccl.so.2.
inline constexpr char kLibrary[] = "libnccl.so.2";

// Puts those of NCCL's environment variables in place that links rely on. Before Load(), while the process has one
// thread.
void SetEnvironment();
// All NCCL_* variables of this process, "NAME=VALUE", sorted: what else may change what NCCL does.
std::vector<std::string> Environment();

}  // namespace rwkv::worker::nccl
