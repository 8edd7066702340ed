// Links between workers: rwkv.v1.Link over gRPC. The first message of a Transfer names the epoch and has step 0; the
// receiving worker answers with initial metadata once that epoch is open there. In this the two also agree on how rows
// move: in the messages, or from device to device; headers and the end of the link always go by gRPC.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/channel.h"
#include "grpcpp/impl/service_type.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

// Bytes that a server must be willing to receive in one message of a link of this shape.
int64_t MaxTransferBytes(const LinkShape& shape);

// Without the rows if the frame's stay in device memory.
v1::TransferRequest FrameToProto(const std::string& epoch, const LinkShape& shape, const LinkFrame& frame);
// kInvalidArgument: of another epoch, or sizes that contradict each other or the shape. `rows_inside`: the rows come by
// gRPC.
absl::Status CheckTransfer(const v1::TransferRequest& request, const std::string& epoch, const LinkShape& shape,
                           bool rows_inside = true);
// Of a request that CheckTransfer() has accepted.
LinkHeader HeaderOf(const v1::TransferRequest& request);

// What the stage after makes of an offer: whether rows go by its own `choice.device`, and if not, why. kFailedPrecondition:
// one of the two wants device links and nothing else, and they do not fit.
struct LinkAgreement {
  bool by_device = false;
  std::string why_not;
};
absl::StatusOr<LinkAgreement> Agree(const v1::LinkOffer& offer, const LinkChoice& choice);

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
