// Channels between our own processes.
#pragma once

#include <memory>
#include <string>

#include "grpcpp/channel.h"

namespace rwkv::common {

struct ChannelOptions {
  int max_receive_bytes = 4 << 20;  // A larger answer is RESOURCE_EXHAUSTED; a compressed one is UNIMPLEMENTED.
};

// A channel of its own (never shared with another MakeChannel to the same address, so bulk data does not delay control
// on another one). Connects lazily, tries again at least once a second for as long as it lives, notices a silent peer
// within 15 s by keepalive pings while calls run, and ignores proxy settings. Not encrypted.
// A bad address shows as UNAVAILABLE on the first call.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ChannelOptions& options = {});

}  // namespace rwkv::common
