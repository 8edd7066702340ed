#include "services/router/core/session_table.h"

#include <utility>

#include "absl/status/statusor.h"
#include "services/common/logging.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

void ToProto(absl::Duration duration, google::protobuf::Duration* proto) {
  proto->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

}  // namespace

SessionTable::SessionTable(const CoreContext& context, std::function<void(Session&)> lost)
    : context_(context), lost_(std::move(lost)), next_renewal_(context.Now()) {}

Session* SessionTable::Find(const std::string& id) {
  const auto it = sessions_.find(id);
  return it == sessions_.end() ? nullptr : &it->second;
}

const Session* SessionTable::Find(const std::string& id) const {
  const auto it = sessions_.find(id);
  return it == sessions_.end() ? nullptr : &it->second;
}

void SessionTable::Touch(const Session& session) {
  touched_.insert(session.id);
  ++version_;
}

void SessionTable::Touch() {
  for (const auto& [id, session] : sessions_) Touch(session);
}

Session& SessionTable::Of(const std::string& id) {
  Session& session = sessions_[id];
  session.id = id;
  return session;
}

v1::AcquireLeaseRequest SessionTable::AcquireRequest(const std::string& id) const {
  v1::AcquireLeaseRequest request;
  request.set_session_id(id);
  request.set_holder(context_.options.router);
  request.set_incarnation(context_.options.incarnation);
  ToProto(context_.options.lease_ttl, request.mutable_ttl());
  return request;
}

void SessionTable::Sweep() {
  for (const std::string& id : std::exchange(touched_, {})) {
    const auto it = sessions_.find(id);
    if (it == sessions_.end()) continue;
    Session& session = it->second;
    if (session.turn != nullptr || session.next != nullptr || session.saves > 0 || session.releasing) continue;
    if (session.leased) {
      Release(session);
    } else {
      sessions_.erase(it);
    }
  }
  Renew();
}

void SessionTable::Release(Session& session) {
  v1::ReleaseLeaseRequest request;
  *request.mutable_lease() = session.lease;
  session.releasing = RunStoreJob<absl::Status>(
      context_.world,
      [this, request = std::move(request)] {
        return context_.catalog->ReleaseLease(request, context_.StoreDeadline()).status();
      },
      [this, id = session.id](absl::Status) {
        // Whether or not the store heard of it: the lease ends by itself.
        Session* const released = Find(id);
        if (released == nullptr) return;
        released->releasing = false;
        released->leased = false;
        Touch(*released);
      });
  if (!session.releasing) touched_.insert(session.id);  // Too much waits for the store: with the next sweep.
}

void SessionTable::Renew() {
  if (renewing_ || context_.world->Now() < next_renewal_) return;
  next_renewal_ = context_.world->Now() + context_.options.lease_ttl / 3;
  v1::RenewLeasesRequest request;
  ToProto(context_.options.lease_ttl, request.mutable_ttl());
  for (auto& [id, session] : sessions_) {
    if (!session.leased || session.releasing) continue;
    // A snapshot that is still on its way is worth less than another router's turn: that one takes the lease when it
    // has run out, and the snapshot comes to nothing.
    if (session.turn == nullptr && session.next == nullptr) {
      session.stale = true;
    } else {
      *request.add_leases() = session.lease;
    }
  }
  if (request.leases().empty()) return;
  using Renewed = absl::StatusOr<v1::RenewLeasesResponse>;
  renewing_ = RunStoreJob<Renewed>(
      context_.world,
      [this, request = std::move(request)] { return context_.catalog->RenewLeases(request, context_.StoreDeadline()); },
      [this](Renewed renewed) {
        renewing_ = false;
        if (!renewed.ok()) return;  // Tried again soon; until then writes say whether the lease still holds.
        for (const v1::Lease& lease : renewed->lost()) {
          Session* const session = Find(lease.session_id());
          if (session == nullptr || session->lease.fencing_token() != lease.fencing_token()) continue;
          if (session->releasing || !session->leased) continue;
          common::LogWarning("lease_lost", {{"session", session->id}});
          session->leased = false;
          Touch(*session);
          lost_(*session);
        }
      });
}

}  // namespace rwkv::router
