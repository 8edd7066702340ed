// rwkvctl chat: a conversation at the terminal, kept in a session.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeChatCommand();

}  // namespace rwkv::rwkvctl
