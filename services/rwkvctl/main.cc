// rwkvctl: the command line of the cluster. See rwkvctl.h.
#include <pwd.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_split.h"
#include "grpc/support/log.h"
#include "grpcpp/channel.h"
#include "services/common/channel.h"
#include "services/common/end_process.h"
#include "services/common/security/security.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/rwkvctl.h"
#include "services/rwkvctl/signal_interrupts.h"

namespace {

std::string HomeFolder() {
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') return home;
  const passwd* user = getpwuid(getuid());
  return user != nullptr ? user->pw_dir : "/";
}

absl::StatusOr<std::unique_ptr<rwkv::router::RouterClient>> Connect(
    const std::string& routers, const rwkv::common::ClientSecurityOptions& security) {
  rwkv::common::ChannelOptions options;
  if (!security.authorities.empty()) {
    const absl::StatusOr<rwkv::common::ClientCredentials> made = rwkv::common::MakeClientCredentials(security);
    if (!made.ok()) return made.status();
    options.credentials = made->credentials;
    options.server_name = made->server_name;
  }
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (const std::string& address : std::vector<std::string>(absl::StrSplit(routers, ','))) {
    channels.push_back(rwkv::common::MakeChannel(address, options));
  }
  return rwkv::router::MakeRouterClient(channels);
}

}  // namespace

int main(int argc, char** argv) {
  // While a command pauses between two calls, nobody but gRPC's own poller finishes a connection that was begun, every
  // 5 s unless told otherwise: `status --wait` would hear of a router that much later.
  setenv("GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS", "50", /*overwrite=*/0);
  gpr_set_log_function([](gpr_log_func_args*) {});  // What came of it is in the status that is told.
  rwkv::rwkvctl::SignalInterrupts& interrupts = rwkv::rwkvctl::SignalInterrupts::Start();
  std::ios::sync_with_stdio(false);
  std::cin.tie(nullptr);
  const rwkv::rwkvctl::Environment environment{
      std::cin,
      std::cout,
      std::cerr,
      interrupts,
      isatty(STDIN_FILENO) != 0,
      isatty(STDOUT_FILENO) != 0,
      isatty(STDERR_FILENO) != 0,
      HomeFolder() + "/.cache/rwkv-serving/clusters",
      Connect,
  };
  rwkv::common::EndProcess(rwkv::rwkvctl::Run(std::vector<std::string>(argv + 1, argv + argc), environment));
}
