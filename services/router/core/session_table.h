// The sessions that a router holds the leases of, or is about to.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/turn.h"

namespace rwkv::router {

// Part of the core: one thread at a time, no clock of its own. Sessions stay where they are until a sweep lets go of
// them.
class SessionTable {
 public:
  // `context` is borrowed; `lost` is told of a session whose lease another router has.
  SessionTable(const CoreContext& context, std::function<void(Session&)> lost);

  bool empty() const { return sessions_.empty(); }
  // Null: nobody needs it.
  Session* Find(const std::string& id);
  const Session* Find(const std::string& id) const;
  // The session, its lease, or who has or wants it is another: those that depend on it look again.
  void Touch(const Session& session);
  void Touch();  // All of them.
  // Those since the last sweep.
  const std::set<std::string>& touched() const { return touched_; }
  // Another with each of these.
  uint64_t version() const { return version_; }
  // Made if there is none.
  Session& Of(const std::string& id);
  v1::AcquireLeaseRequest AcquireRequest(const std::string& id) const;

  // Lets go of sessions that nobody needs any more, and renews the leases of those that have a turn in time.
  void Sweep();

 private:
  void Release(Session& session);
  void Renew();

  const CoreContext& context_;
  const std::function<void(Session&)> lost_;
  std::map<std::string, Session> sessions_;
  std::set<std::string> touched_;
  uint64_t version_ = 0;
  bool renewing_ = false;
  absl::Time next_renewal_;
};

}  // namespace rwkv::router
