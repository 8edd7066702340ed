// A client: turns one after the other, resumed at whichever router is there, and every message checked.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "services/common/grpc_status.h"
#include "services/common/sampling/sampling_params.h"
#include "services/common/tenant_ids.h"
#include "services/router/turns/call_kinds.h"
#include "services/worker/client/fake_worker.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
namespace {

// Faults come until 12 s and last up to 9 s: 21 s in which nothing may work. Then it takes at most 3 s until the client
// sees that its call is lost, 3 s until a lease runs out, 3 s until a call to the store is given up, and 20 s in the line
// (max_wait).
constexpr absl::Duration kLongestPause = absl::Seconds(21 + 3 + 3 + 3 + 20);

}  // namespace

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

std::vector<std::vector<uint32_t>> SimClient::Undisturbed(std::vector<uint32_t> log,
                                                          const std::vector<uint32_t>& prompt) const {
  log.insert(log.end(), prompt.begin(), prompt.end());
  std::vector<std::vector<uint32_t>> answers;
  for (int family = 0; family < cluster_->families; ++family) {
    answers.push_back(worker::FakeModel::Generate(log, tokens_, OfFamily(TurnSampling(), family), kVocabulary));
  }
  return answers;
}

bool SimClient::IsExpected(uint64_t index, uint32_t token) {
  if (expected_.empty()) {
    // What the log had before: whether a turn that was given up is in it is the log's to say, and CheckLog() checks it.
    const ModelStore::SessionRow& session = cluster_->store.session(session_);
    const uint64_t begin = session.turns.at(RequestId()).begin();
    expected_ = Undisturbed({session.log.begin(), session.log.begin() + begin}, Prompt(turn_));
  }
  bool is_expected = false;
  for (std::vector<uint32_t>& one : expected_) {
    if (index >= one.size()) continue;
    if (one[index] == token) {
      is_expected = true;
    } else {
      one.clear();  // A turn stays in one family.
    }
  }
  return is_expected;
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

void SimClient::CheckShown(const Attempt& attempt, const v1::GenerateResponse& message) {
  if (static_cast<int>(attempt.number) != turn_) return;  // A call of an earlier turn that nobody waits for.
  const ModelStore::SessionRow& session = cluster_->store.session(session_);
  const auto turn = session.turns.find(RequestId());
  if (turn == session.turns.end()) return cluster_->Violated("T1: a token of a turn that is not in the log");
  CheckOwn();
  if (message.has_finish()) {
    if (turn->second.state() != v1::TURN_STATE_FINISHED) cluster_->Violated("T1: an end that is not in the log");
    return;
  }
  const uint64_t position = turn->second.begin() + turn->second.prompt_count() + message.index();
  if (message.index() >= turn->second.token_count() || position >= session.log.size() ||
      session.log[position] != message.token_id()) {
    cluster_->Violated(absl::StrCat("T1: token ", message.index(), " of ", session_, " is shown and not in the log"));
  }
}

void SimClient::CheckOwn() {
  const ModelStore::SessionRow& session = cluster_->store.session(session_);
  const auto turn = session.turns.find(RequestId());
  if (turn == session.turns.end()) return;
  const std::vector<uint32_t> prompt = Prompt(turn_);
  const uint64_t begin = turn->second.begin();
  const bool is_own = begin + prompt.size() <= session.log.size() && turn->second.prompt_count() == prompt.size() &&
                      std::equal(prompt.begin(), prompt.end(), session.log.begin() + begin);
  if (!is_own) cluster_->Violated(absl::StrCat("B3: ", RequestId(), " of ", session_, " is another client's"));
}

void SimClient::CheckRefused(const Attempt& attempt, const absl::Status& status) {
  if (!absl::IsResourceExhausted(status) || attempt.answered) return;
  const absl::Duration took = cluster_->time.Now() - attempt.arrived;
  // One that was in the line has left it for another tenant's, or because it waited for too long.
  const bool is_at_once = took <= absl::Milliseconds(10) || !tenant_.empty();
  if (!common::GetRetryDelay(status).has_value()) {
    cluster_->Violated(absl::StrCat("B1: refused without a time to come back: ", status.ToString()));
  } else if (!is_at_once && took < cluster_->turn_options.max_wait / 2) {
    cluster_->Violated(absl::StrCat("B1: refused after ", absl::FormatDuration(took), ": ", status.ToString()));
  }
}

void SimClient::CheckPause() {
  const absl::Duration pause = cluster_->time.Now() - std::exchange(told_at_, cluster_->time.Now());
  cluster_->longest_pause = std::max(cluster_->longest_pause, pause);
  if (pause > kLongestPause) {
    cluster_->Violated(
        absl::StrCat("T3: ", session_, " ", RequestId(), " stood still for ", absl::FormatDuration(pause)));
  }
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

void SimClient::CheckLog() {
  const ModelStore::SessionRow& session = cluster_->store.session(session_);
  if (session.log.size() < base_.size() || !std::equal(base_.begin(), base_.end(), session.log.begin())) {
    return cluster_->Violated(absl::StrCat("T2: ", session_, " does not begin with what it was cut or forked from"));
  }
  for (const auto& [id, log] : parents_) {
    const std::vector<uint32_t>& now = cluster_->store.session(id).log;
    if (now.size() < log.size() || !std::equal(log.begin(), log.end(), now.begin())) {
      return cluster_->Violated(absl::StrCat("T2: ", id, " is not what it was when it was forked"));
    }
  }
  std::map<uint64_t, int> turns;  // Number, by where it begins.
  for (int turn = 0; turn < turns_; ++turn) {
    const auto row = session.turns.find(RequestIdOf(turn));
    if (row == session.turns.end()) {
      if (told_.count(turn) > 0) cluster_->Violated(absl::StrCat("T1: ", RequestIdOf(turn), " is not in the log"));
      continue;
    }
    if (row->second.begin() < base_.size()) continue;
    if (!turns.emplace(row->second.begin(), turn).second) {
      return cluster_->Violated(absl::StrCat("T2: two turns of ", session_, " begin at the same position"));
    }
  }
  std::vector<uint32_t> log = base_;
  for (const auto& [begin, turn] : turns) {
    const v1::Turn& row = session.turns.at(RequestIdOf(turn));
    const std::string name = absl::StrCat(session_, " ", RequestIdOf(turn));
    const std::vector<uint32_t> prompt = Prompt(turn);
    const uint64_t end = begin + prompt.size() + row.token_count();
    if (begin != log.size() || end > session.log.size() ||
        !std::equal(prompt.begin(), prompt.end(), session.log.begin() + begin)) {
      return cluster_->Violated(absl::StrCat("T2: ", name, " does not follow the turn before it"));
    }
    const std::vector<uint32_t> answer(session.log.begin() + begin + prompt.size(), session.log.begin() + end);
    bool is_undisturbed = false;
    for (const std::vector<uint32_t>& one : Undisturbed(log, prompt)) {
      is_undisturbed |= answer.size() <= one.size() && std::equal(answer.begin(), answer.end(), one.begin());
    }
    if (!is_undisturbed) return cluster_->Violated(absl::StrCat("T3: ", name, " is not as an undisturbed run"));
    const auto told = told_.find(turn);
    if (told != told_.end() && told->second != answer) {
      return cluster_->Violated(absl::StrCat("T1: the log of ", name, " is not what its client was told"));
    }
    log.assign(session.log.begin(), session.log.begin() + end);
  }
  if (log.size() != session.log.size()) {
    cluster_->Violated(absl::StrCat("T2: the log of ", session_, " has more than its turns"));
  }
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
