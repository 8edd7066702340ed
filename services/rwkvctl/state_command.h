// rwkvctl state: a session's recurrent state, into a .safetensors file.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeStateCommand();

}  // namespace rwkv::rwkvctl
