// rwkvctl status: every process of the cluster.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeStatusCommand();

}  // namespace rwkv::rwkvctl
