// rwkvctl convert: a checkpoint of any format as .safetensors in a chosen precision. Needs no router.
#pragma once

#include <memory>

#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeConvertCommand();

}  // namespace rwkv::rwkvctl
