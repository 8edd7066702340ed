// The flags that say how tokens are drawn, for the commands that draw some.
#pragma once

#include "rwkv/v1/common.pb.h"
#include "services/rwkvctl/flag_set.h"

namespace rwkv::rwkvctl {

// Fields are set only by flags that are given; the router checks their ranges. `sampling` outlives `flags`.
void AddSamplingFlags(FlagSet& flags, v1::Sampling* sampling);

}  // namespace rwkv::rwkvctl
