// rwkvctl load: how much a cluster serves, and how fast.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeLoadCommand();

}  // namespace rwkv::rwkvctl
