// rwkvctl eval: how good the model is at texts of one's own.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeEvalCommand();

}  // namespace rwkv::rwkvctl
