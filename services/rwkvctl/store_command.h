// rwkvctl store: looks after a state store that is stopped.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeStoreCommand();

}  // namespace rwkv::rwkvctl
