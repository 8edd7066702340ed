// rwkvctl logits: the logits after every token, into a .npy file.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeLogitsCommand();

}  // namespace rwkv::rwkvctl
