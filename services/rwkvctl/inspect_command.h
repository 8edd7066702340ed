// rwkvctl inspect: what a checkpoint file is. Needs no router.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeInspectCommand();

}  // namespace rwkv::rwkvctl
