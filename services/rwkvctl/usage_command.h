// rwkvctl usage: what a tenant has used, and what it keeps.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeUsageCommand();

}  // namespace rwkv::rwkvctl
