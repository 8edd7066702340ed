// rwkvctl sessions: create, list, show, fork, rewind, delete.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeSessionsCommand();

}  // namespace rwkv::rwkvctl
