// Messages of a gRPC link: frames as they cross the wire, and how two stages agree on the way that rows take.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
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

}  // namespace rwkv::worker
