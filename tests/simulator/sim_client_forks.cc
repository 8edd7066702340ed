// A client that goes back: its session is rewound, or it goes on in a fork.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "services/common/grpc_status.h"
#include "services/router/core/call_kinds.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {

void SimClient::GoOn() {
  const absl::Duration pause = cluster_->Between(absl::Milliseconds(1), absl::Milliseconds(200));
  if (done() || cluster_->Chance(0.7)) return NextAttempt(pause);
  turns_back_ = true;
  const uint64_t position = cluster_->Draw() % (cluster_->store.session(session_).log.size() + 1);
  if (cluster_->Chance(0.5)) return Rewind(position, pause);
  Fork(position, pause);
}

void SimClient::Rewind(uint64_t position, absl::Duration pause) {
  cluster_->time.After(pause, [this, position] {
    auto attempt = std::make_shared<SimCall>();
    attempt->router = cluster_->AnyRouter();
    SimRouter& router = *cluster_->routers[attempt->router];
    attempt->router_life = router.life();
    attempt->call = cluster_->next_call++;
    const auto over = [this, attempt, position](const absl::Status& status) {
      if (std::exchange(attempt->over, true)) return;
      if (!status.ok()) {
        if (!absl::IsUnavailable(status) && !absl::IsAborted(status) && !absl::IsResourceExhausted(status) &&
            !absl::IsCancelled(status)) {
          return cluster_->Violated(absl::StrCat("T3: a rewind of ", session_, " ended with ", status.ToString()));
        }
        const absl::Duration delay = common::GetRetryDelay(status).value_or(absl::ZeroDuration());
        return Rewind(position, std::max(delay, absl::Milliseconds(20)));
      }
      const std::vector<uint32_t>& log = cluster_->store.session(session_).log;
      if (log.size() < position) return cluster_->Violated(absl::StrCat("T2: a rewind of ", session_, " cut too much"));
      BeginAt({log.begin(), log.begin() + static_cast<int64_t>(position)});
    };
    if (router.alive()) {
      auto turn = std::make_shared<router::Turn>();
      turn->kind = std::make_unique<router::ExclusiveCall>(
          [this, attempt, position](const v1::AcquireLeaseResponse& held) {
            if (attempt->over) return absl::DeadlineExceededError("nobody waits for it any more");
            v1::RewindSessionRequest rewind;
            *rewind.mutable_lease() = held.lease();
            rewind.set_log_branch(held.log_branch());
            rewind.set_position(position);
            return cluster_->store.RewindSession(rewind, absl::InfiniteFuture()).status();
          },
          false,
          [this, attempt, over](const absl::Status& status) {
            const SimRouter& from = *cluster_->routers[attempt->router];
            if (!from.alive() || from.life() != attempt->router_life) return;
            cluster_->time.After(cluster_->NetworkDelay(), [over, status] { over(status); });
          });
      turn->call = attempt->call;
      turn->model = cluster_->model;
      turn->session_id = session_;
      turn->tenant = tenant_;
      router.Deliver(cluster_->NetworkDelay(), [&router, turn] {
        turn->arrival = router.Now();
        router.core->Arrive(turn);
      });
    }
    cluster_->time.After(absl::Seconds(3), [this, attempt, over] {
      if (attempt->over) return;
      (void)GivesUp(cluster_, *attempt, absl::InfinitePast());
      over(absl::UnavailableError("the connection is lost"));
    });
  });
}

void SimClient::Fork(uint64_t position, absl::Duration pause) {
  cluster_->time.After(pause, [this, position] {
    v1::ForkSessionRequest fork;
    fork.set_session_id(session_);
    fork.set_position(position);
    fork.set_new_session_id(absl::StrCat(session_, "-", turn_));
    const absl::Status status = cluster_->store.ForkSession(fork, absl::InfiniteFuture()).status();
    if (absl::IsUnavailable(status)) return Fork(position, absl::Milliseconds(20));
    if (!status.ok() && !absl::IsAlreadyExists(status)) {  // An answer was lost.
      return cluster_->Violated(absl::StrCat("T3: a fork of ", session_, " ended with ", status.ToString()));
    }
    const std::vector<uint32_t>& log = cluster_->store.session(session_).log;
    parents_[session_] = log;
    session_ = fork.new_session_id();
    BeginAt({log.begin(), log.begin() + static_cast<int64_t>(position)});
  });
}

void SimClient::BeginAt(std::vector<uint32_t> log) {
  base_ = std::move(log);
  told_.clear();
  gave_up_ = true;  // What was cut away is not known any more: a call of it that comes late is a turn again.
  turns_back_ = false;
  told_at_ = cluster_->time.Now();
  CheckLog();
  NextAttempt(absl::Milliseconds(1));
}

}  // namespace rwkv::simulator
