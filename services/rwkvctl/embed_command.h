// rwkvctl embed: a text as one vector.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeEmbedCommand();

}  // namespace rwkv::rwkvctl
