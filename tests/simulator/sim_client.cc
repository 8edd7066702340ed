// A client: turns one after the other, resumed at whichever router is there. What it checks: sim_client_laws.cc; how it
// goes back: sim_client_forks.cc.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "services/common/grpc_status.h"
#include "services/common/sampling/sampling_params.h"
#include "services/common/tenant_ids.h"
#include "services/router/core/call_kinds.h"
#include "services/worker/client/fake_worker.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
// Messages on their way from a router to a client; none while the client takes nothing.
class SimStream final : public router::ResponseStream<v1::GenerateResponse>,
                        public std::enable_shared_from_this<SimStream> {
 public:
  SimStream(Cluster* cluster, SimClient* client, std::shared_ptr<SimClient::Attempt> attempt)
      : cluster_(cluster), client_(client), attempt_(std::move(attempt)) {}

  void Send(v1::GenerateResponse response) override {
    client_->CheckShown(*attempt_, response);
    attempt_->answered = true;
    sent_.push_back(std::move(response));
    // The end comes behind all of them.
    if (static_cast<int>(sent_.size()) > cluster_->turn_options.max_stream_messages + 1) {
      cluster_->Violated(absl::StrCat("B1: ", sent_.size(), " messages wait for a client"));
    }
    Flow();
  }
  size_t queued() const override { return sent_.size(); }
  void OnRoom(std::function<void()> on_room) override {
    if (sent_.empty()) return on_room();
    on_room_ = std::move(on_room);
  }
  void Close(absl::Status status) override {
    if (!status.ok()) sent_.clear();  // An error drops what waits.
    if (cluster_->options.broken.core_refuses_in_silence) {
      status = absl::Status(status.code(), status.message());  // Its details are gone.
    }
    client_->CheckRefused(*attempt_, status);
    closed_ = std::move(status);
    Flow();
  }

 private:
  static constexpr absl::Duration kDelay = absl::Microseconds(400);

  void Flow() {
    const SimRouter& router = *cluster_->routers[attempt_->router];
    if (!router.alive() || router.life() != attempt_->router_life) return;  // The connection died with its router.
    if (client_->held_) {
      client_->when_let_go_.push_back([self = shared_from_this()] { self->Flow(); });
      return;
    }
    for (v1::GenerateResponse& response : sent_) {
      cluster_->time.After(kDelay, [client = client_, attempt = attempt_, response = std::move(response)] {
        client->Heard(attempt, response);
      });
    }
    sent_.clear();
    if (auto on_room = std::exchange(on_room_, nullptr)) on_room();
    if (!closed_.has_value()) return;
    cluster_->time.After(
        kDelay, [client = client_, attempt = attempt_, status = *closed_] { client->Closed(attempt, status); });
    closed_.reset();
  }

  Cluster* const cluster_;
  SimClient* const client_;
  const std::shared_ptr<SimClient::Attempt> attempt_;
  std::vector<v1::GenerateResponse> sent_;
  std::function<void()> on_room_;
  absl::optional<absl::Status> closed_;
};

// Sessions of two tenants have the same names.
SimClient::SimClient(Cluster* cluster, int index, const std::string& tenant, int turns, int tokens)
    : cluster_(cluster),
      index_(index),
      turns_(turns),
      tokens_(tokens),
      tenant_(tenant),
      session_(common::ScopedId(cluster->options.broken.tenants_share_ids ? "" : tenant,
                                absl::StrCat("s", tenant.empty() ? index : index / 2))) {}

void SimClient::Start() {
  told_at_ = cluster_->time.Now();
  NextAttempt(absl::ZeroDuration());
}

std::vector<uint32_t> SimClient::Prompt(int turn) const {
  std::vector<uint32_t> prompt;
  if (turn == 0 && cluster_->turn_options.prefix_cache.enabled) prompt = SharedBeginning(18 + index_ * 5);
  for (int i = 0; i < 3 + (index_ + turn) % 9; ++i) {
    prompt.push_back((index_ * 101 + turn * 13 + i * 7) % kVocabulary);
  }
  return prompt;
}

v1::Sampling SimClient::TurnSampling() const {
  v1::Sampling sampling;
  sampling.set_temperature(1);
  return common::CompleteSampling(sampling, seed());
}

void SimClient::NextAttempt(absl::Duration pause) {
  cluster_->time.After(pause, [this, turn = turn_] {
    if (turn != turn_ || done()) return;
    attempt_ = Call(cluster_->AnyRouter(), received_.size());
    heard_at_ = cluster_->time.Now();
    Watch(attempt_);
  });
}

std::shared_ptr<SimClient::Attempt> SimClient::Call(int index, uint64_t resume_from) {
  auto attempt = std::make_shared<Attempt>();
  SimRouter& router = *cluster_->routers[index];
  attempt->router = index;
  attempt->router_life = router.life();
  attempt->call = cluster_->next_call++;
  attempt->number = turn_;
  attempt->first = resume_from;
  auto turn = std::make_shared<router::Turn>();
  turn->kind = std::make_unique<router::GenerateCall>(std::make_shared<SimStream>(cluster_, this, attempt));
  turn->call = attempt->call;
  turn->model = cluster_->model;
  turn->session_id = session_;
  turn->tenant = tenant_;
  turn->named = true;
  turn->request_id = RequestId();
  turn->prompt = Prompt(turn_);
  turn->input_field = "tokens.ids";
  turn->spec.set_max_tokens(tokens_);
  *turn->spec.mutable_sampling() = TurnSampling();
  turn->resume_from = resume_from;
  attempt->turn = turn;
  const absl::Duration delay = cluster_->NetworkDelay();
  if (!router.alive()) {
    cluster_->time.After(delay, [this, attempt] { Closed(attempt, absl::UnavailableError("nobody is there")); });
    return attempt;
  }
  router.Deliver(delay, [this, attempt, &router, turn] {
    turn->arrival = router.Now();
    attempt->arrived = cluster_->time.Now();
    router.core->Arrive(turn);
  });
  return attempt;
}

void SimClient::Watch(const std::shared_ptr<Attempt>& attempt) {
  cluster_->time.After(absl::Milliseconds(200), [this, attempt] {
    if (attempt->over || attempt != attempt_) return;
    if (!GivesUp(cluster_, *attempt, held_ ? absl::InfiniteFuture() : heard_at_)) return Watch(attempt);
    if (cluster_->Chance(0.4)) GiveUp();
    Closed(attempt, absl::UnavailableError("the connection is lost"));
  });
}

void SimClient::Heard(const std::shared_ptr<Attempt>& attempt, const v1::GenerateResponse& message) {
  if (static_cast<int>(attempt->number) != turn_ || attempt->over) return;
  heard_at_ = cluster_->time.Now();
  cluster_->time.Mix(message.SerializeAsString());
  if (!message.has_finish()) {
    if (!IsExpected(message.index(), message.token_id())) {
      return cluster_->Violated(
          NotUndisturbed(attempt->turn, message.index(), absl::StrCat(session_, " ", RequestId())));
    }
    if (attempt != attempt_) return;  // The second of two calls.
    if (message.index() != received_.size()) {
      return cluster_->Violated(absl::StrCat("T1: index ", message.index(), " where ", received_.size(), " is next"));
    }
    CheckPause();
    received_.push_back(message.token_id());
    ++cluster_->tokens;
    return;
  }
  if (attempt != attempt_) return;
  attempt->over = true;
  if (message.finish().reason() == v1::FINISH_REASON_CANCELLED && gave_up_) {
    // A turn that it gave up came late, and closed this one, as a turn does with an open one before it.
    CheckPause();
    received_.clear();
    expected_.clear();
    ++turn_;
    CheckLog();
    return NextAttempt(absl::Milliseconds(1));
  }
  if (message.finish().reason() != v1::FINISH_REASON_LENGTH || static_cast<int>(received_.size()) != tokens_) {
    return cluster_->Violated(
        absl::StrCat("T3: ", session_, " ", RequestId(), " ended after ", received_.size(), " tokens"));
  }
  CheckPause();
  told_[turn_] = std::move(received_);
  received_.clear();
  expected_.clear();
  ++turn_;
  CheckLog();
  GoOn();
}

void SimClient::Closed(const std::shared_ptr<Attempt>& attempt, const absl::Status& status) {
  cluster_->time.Mix(status.ToString());
  if (attempt->over || attempt != attempt_ || static_cast<int>(attempt->number) != turn_) return;
  if (status.ok()) return;  // The last message is behind it.
  attempt->over = true;
  CheckOwn();
  // What a client may do something about by waiting; a turn that is sound ends with nothing else.
  if (!absl::IsUnavailable(status) && !absl::IsAborted(status) && !absl::IsResourceExhausted(status) &&
      !absl::IsCancelled(status)) {
    return cluster_->Violated(absl::StrCat("T3: ", session_, " ", RequestId(), " ended with ", status.ToString()));
  }
  NextAttempt(std::max(common::GetRetryDelay(status).value_or(absl::ZeroDuration()), absl::Milliseconds(20)));
}

void SimClient::HangUp() {
  SimRouter& router = *cluster_->routers[attempt_->router];
  if (router.alive() && router.life() == attempt_->router_life) {
    router.Deliver(absl::Milliseconds(1), [&router, call = attempt_->call] { router.core->Cancel(call); });
  }
  attempt_->over = true;
}

void SimClient::CancelCall() {
  if (attempt_ == nullptr || attempt_->over || done()) return;
  HangUp();
  NextAttempt(cluster_->Between(absl::Milliseconds(1), absl::Seconds(1)));
}

void SimClient::GiveUp() {
  // The last turn is what the run waits for.
  if (turn_ + 1 >= turns_ || attempt_ == nullptr || static_cast<int>(attempt_->number) != turn_) return;
  if (!attempt_->over && cluster_->Chance(0.5)) HangUp();  // Else the router does not hear of it.
  attempt_->over = true;
  gave_up_ = true;
  told_at_ = cluster_->time.Now();
  received_.clear();
  expected_.clear();
  ++turn_;
  NextAttempt(cluster_->Between(absl::Milliseconds(1), absl::Milliseconds(100)));
}

void SimClient::CallTwice() {
  if (!done() && !turns_back_) Call(static_cast<int>(cluster_->Draw() % cluster_->routers.size()), received_.size());
}

void SimClient::Hold(bool held) {
  held_ = held;
  if (held) return;
  heard_at_ = told_at_ = cluster_->time.Now();
  std::vector<std::function<void()>> waiting;
  waiting.swap(when_let_go_);
  for (const std::function<void()>& flow : waiting) flow();
}

}  // namespace rwkv::simulator
