// Links between workers: rwkv.v1.Link over gRPC. The first message of a Transfer names the epoch and has step 0; the
// receiving worker answers with initial metadata once that epoch is open there. In this the two also agree on how rows
// move: in the messages, or from device to device; headers and the end of the link always go by gRPC.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "grpcpp/channel.h"
#include "grpcpp/impl/service_type.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

class GrpcLinkService;

// Thread-safe. Destroy it after the server that serves service() was shut down.
class GrpcLinkTransport final : public LinkTransport {
 public:
  using ChannelFactory = std::function<std::shared_ptr<grpc::Channel>(const std::string& address)>;

  GrpcLinkTransport(const LinkShape& shape, ChannelFactory make_channel, LinkChoice choice = {});
  ~GrpcLinkTransport() override;

  // rwkv.v1.Link, for the worker's server.
  grpc::Service* service();

  std::unique_ptr<LinkReceiver> Accept(const std::string& epoch) override;
  std::unique_ptr<LinkSender> Dial(const std::string& address, const std::string& epoch) override;

 private:
  const LinkShape shape_;
  const ChannelFactory make_channel_;
  const LinkChoice choice_;
  const std::unique_ptr<GrpcLinkService> service_;
};

}  // namespace rwkv::worker
