// What a link can use where both stages compute on devices that reach each other: rows go from device to device, and
// only the header through the host.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

// Makes the ends of such links. Thread-safe; outlives them.
class DeviceLinks {
 public:
  virtual ~DeviceLinks() = default;

  // Both ends must be of one kind and version, and of two devices.
  virtual absl::string_view kind() const = 0;  // "nccl"
  virtual int version() const = 0;
  virtual std::string device() const = 0;  // kernels::Device::identity()

  // What both ends must know of one pair, and nobody else.
  virtual absl::StatusOr<std::string> NewPairId() = 0;

  // This end of pair `id`, which sends or receives. Waits for the other end, within a limit of the implementation's or
  // until `stop`. kUnavailable: it did not come. kInvalidArgument: that is no id.
  virtual absl::StatusOr<std::unique_ptr<DeviceRows>> Join(const std::string& id, bool sends, const LinkShape& shape,
                                                           const absl::Notification& stop) = 0;
};

// What this stage's links shall use.
enum class LinkKind : uint8_t {
  kAuto,    // Device links where both ends have them, else gRPC.
  kGrpc,    // gRPC for everything.
  kDevice,  // Device links, or no link.
};

struct LinkChoice {
  LinkKind kind = LinkKind::kGrpc;
  DeviceLinks* device = nullptr;  // Null: there are none here.
  std::string why_none;           // Then: why.
};

}  // namespace rwkv::worker
