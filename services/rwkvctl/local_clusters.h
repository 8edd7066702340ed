// Which clusters run on this machine. deploy/local/run.sh writes a file for each into one folder and stop.sh removes
// it; lines KEY=VALUE:
//   router      HOST:PORT, several by commas
//   pid         of each router, by commas
//   started     when each of them began, in clock ticks since boot (/proc/PID/stat, field 22); with the pid it names a
//               process for good, so that the file of a cluster that crashed is recognised
//   data_dir    the cluster's folder
//   model       the file it serves
//   tls_authorities, api_key_file
//               with TLS: whose certificates are believed, and the file of the API key to show
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace rwkv::rwkvctl {

struct LocalCluster {
  std::string router;
  std::string data_dir;
  std::string model;
  std::string tls_authorities;  // Empty: without TLS; api_key_file too then.
  std::string api_key_file;
};

// kInvalidArgument: not addresses by commas.
absl::Status CheckRouters(absl::string_view routers);

// Those of which a router's process is alive, by address. A file that says something else than the above is passed over, and
// a folder that is not there holds none.
std::vector<LocalCluster> RunningClusters(const std::string& folder);

// The only one. kNotFound: none runs. kFailedPrecondition: several do; lists them.
absl::StatusOr<LocalCluster> OnlyCluster(absl::Span<const LocalCluster> clusters);

// The one that every router of `routers`, addresses by commas, is of; null: there is none.
const LocalCluster* ClusterOf(absl::string_view routers, absl::Span<const LocalCluster> clusters);

// When a process began, as above; 0: there is none of that number, or a dead one that nobody has waited for.
uint64_t StartTicks(int64_t pid);

}  // namespace rwkv::rwkvctl
