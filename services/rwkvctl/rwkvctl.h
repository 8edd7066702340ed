// The command line: finds the command, sets its flags, runs it, prints what went wrong.
#pragma once

#include <functional>
#include <istream>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/common/security/security.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

struct Environment {
  std::istream& in;
  std::ostream& out;
  std::ostream& err;
  Interrupts& interrupts;
  bool in_is_terminal = false;
  bool out_is_terminal = false;
  bool err_is_terminal = false;
  std::string clusters_folder;  // Where local clusters are found, for the default of --router: local_clusters.h.
  // `security` as the flags say; without authorities nothing is encrypted. An error: files that are wrong.
  std::function<absl::StatusOr<std::unique_ptr<router::RouterClient>>(const std::string& address,
                                                                      const common::ClientSecurityOptions& security)>
      connect;
};

// `arguments` without the program's name. The exit status: 0, 1 for a command that failed, 2 for wrong usage; both with
// one line on `err`.
int Run(const std::vector<std::string>& arguments, const Environment& environment);

}  // namespace rwkv::rwkvctl
