// rwkvctl generate: one turn, streamed.
#pragma once

#include <memory>
#include <string>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeGenerateCommand();

// 32 random hex digits: names a turn, so that it can be resumed.
std::string MakeRequestId();

}  // namespace rwkv::rwkvctl
