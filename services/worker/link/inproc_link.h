// Links between stages of one process: tests, and the plain twin of the others.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

class InprocLinkTable;

// The places where stages of this process listen. Every stage gets its own transport from it. Thread-safe; transports
// and links may outlive it.
class InprocLinkNetwork {
 public:
  InprocLinkNetwork();
  ~InprocLinkNetwork();

  // The transport of the stage that listens at `address` (any unique text).
  std::unique_ptr<LinkTransport> Join(const std::string& address, const LinkShape& shape);

  // Frames that have been sent to `address`, over all epochs; and waits until they are so many. False: not in time.
  int64_t FramesSent(const std::string& address) const;
  bool WaitForFrames(const std::string& address, int64_t count, absl::Duration limit) const;

 private:
  const std::shared_ptr<InprocLinkTable> table_;
};

}  // namespace rwkv::worker
