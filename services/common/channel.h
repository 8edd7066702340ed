// Channels between our own processes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "grpcpp/channel.h"
#include "grpcpp/security/credentials.h"

namespace rwkv::common {

struct ChannelOptions {
  std::shared_ptr<grpc::ChannelCredentials> credentials;  // Null: not encrypted. security/security.h
  std::string server_name;  // That a certificate must be for, instead of the host in the address. Empty: that host.
  bool bulk = false;        // For messages of a megabyte: large frames, windows and reads.
  int max_receive_bytes = 4 << 20;  // A larger answer is RESOURCE_EXHAUSTED; a compressed one is UNIMPLEMENTED.
};

// A channel of its own (never shared with another MakeChannel to the same address, so bulk data does not delay control
// on another one). Connects lazily, tries again at least once a second for as long as it lives, notices a silent peer
// within 15 s by keepalive pings while calls run, and ignores proxy settings.
// A bad address shows as UNAVAILABLE on the first call.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ChannelOptions& options = {});

// One to each.
std::vector<std::shared_ptr<grpc::Channel>> MakeChannels(const std::vector<std::string>& addresses,
                                                         const ChannelOptions& options = {});

}  // namespace rwkv::common
