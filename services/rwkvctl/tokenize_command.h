// rwkvctl tokenize and detokenize.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeTokenizeCommand();
std::unique_ptr<Command> MakeDetokenizeCommand();

}  // namespace rwkv::rwkvctl
