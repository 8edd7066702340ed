// Calls of no session, as bytes: good ones, whose inputs begin alike and whose answers are known, and strange ones.
#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "services/common/grpc_status.h"
#include "services/common/sampling/sampling_params.h"
#include "services/common/tenant_ids.h"
#include "services/router/core/call_kinds.h"
#include "services/router/core/turn_input.h"
#include "services/worker/client/fake_worker.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
namespace {

constexpr absl::Duration kDelay = absl::Microseconds(400);
// As long as a client waits for a connection over which nothing comes.
// B2: more than any turn here may come to, sessions with all of their turns included.
constexpr uint64_t kMostPositions = 600;

// What a door that checks nothing makes of it.
absl::StatusOr<router::TurnInput> AsItIs(const v1::GenerateRequest& request) {
  router::TurnInput input;
  input.tokens.assign(request.tokens().ids().begin(), request.tokens().ids().end());
  if (input.tokens.empty()) return absl::InvalidArgumentError("no input");
  input.spec.set_max_tokens(std::min(request.max_tokens(), 1000u));
  *input.spec.mutable_sampling() = request.sampling();
  *input.spec.mutable_stop_token_ids() = request.stop_token_ids();
  return input;
}

}  // namespace

absl::Status CheckCommand(const v1::ExecuteRequest& command) {
  const auto check = [](const auto& ids, const char* what) -> absl::Status {
    for (const uint32_t id : ids) {
      if (id >= kVocabulary) return absl::InternalError(absl::StrCat("token ", id, " as ", what));
    }
    return absl::OkStatus();
  };
  if (command.has_attach()) {
    const v1::AttachSequence& attach = command.attach();
    absl::Status status = check(attach.stop_token_ids(), "a stop");
    status.Update(check(attach.turn_token_ids(), "one that counts"));
    status.Update(common::SamplingParams::Create(attach.sampling(), kVocabulary).status());
    if (attach.stop_token_ids_size() > router::kMaxStopTokenIds || attach.position() > kMostPositions) {
      status.Update(absl::InternalError("an attach beyond all limits"));
    }
    return status;
  }
  for (const v1::StepEntry& entry : command.step().entries()) {
    absl::Status status = check(entry.token_ids(), "input");
    status.Update(check(entry.score_token_ids(), "one to score"));
    if (entry.score_token_ids_size() > entry.token_ids_size()) {
      status.Update(absl::InternalError("more scores than tokens"));
    }
    if (entry.expected_position() + entry.token_ids_size() > kMostPositions) {
      status.Update(absl::InternalError("a sequence beyond all limits"));
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

class SimVisitor::Stream final : public router::ResponseStream<v1::GenerateResponse> {
 public:
  Stream(Cluster* cluster, SimVisitor* visitor, std::shared_ptr<Attempt> attempt)
      : cluster_(cluster), visitor_(visitor), attempt_(std::move(attempt)) {}

  void Send(v1::GenerateResponse response) override {
    Deliver([visitor = visitor_, attempt = attempt_, response = std::move(response)] {
      visitor->Heard(attempt, response);
    });
  }
  size_t queued() const override { return 0; }
  void OnRoom(std::function<void()> on_room) override { on_room(); }
  void Close(absl::Status status) override {
    Deliver([visitor = visitor_, attempt = attempt_, status] { visitor->Closed(attempt, status); });
  }

 private:
  void Deliver(std::function<void()> message) {
    const SimRouter& router = *cluster_->routers[attempt_->router];
    if (router.alive() && router.life() == attempt_->router_life) cluster_->time.After(kDelay, std::move(message));
  }

  Cluster* const cluster_;
  SimVisitor* const visitor_;
  const std::shared_ptr<Attempt> attempt_;
};

SimVisitor::SimVisitor(Cluster* cluster, int index, const std::string& tenant, int visits)
    : cluster_(cluster), index_(index), visits_(visits), tenant_(tenant) {}

std::vector<uint32_t> SharedBeginning(int count) {
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((17 + i * 29) % kVocabulary);
  return tokens;
}

std::string NotUndisturbed(const std::weak_ptr<router::Turn>& turn, uint64_t index, const std::string& of) {
  const std::shared_ptr<router::Turn> there = turn.lock();
  const uint64_t reused = there == nullptr || there->begin > 0 ? 0 : there->reused_tokens;
  const std::string law = reused > 0 ? absl::StrCat("N1: after ", reused, " tokens that were read before ") : "T3: ";
  return absl::StrCat(law, "token ", index, " of ", of, " is not that of an undisturbed run");
}

v1::GenerateRequest SimVisitor::Good() {
  const int shared = 17 + static_cast<int>(cluster_->Draw() % 24);
  std::vector<uint32_t> input = SharedBeginning(shared);
  for (int i = 0; i < 1 + visit_ % 3; ++i) input.push_back((index_ * 131 + visit_ * 17 + i) % kVocabulary);
  v1::GenerateRequest request;
  request.mutable_tokens()->mutable_ids()->Add(input.begin(), input.end());
  request.set_max_tokens(2 + static_cast<uint32_t>(cluster_->Draw() % 5));
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(seed());
  if (cluster_->Chance(0.5)) request.add_prefix_ends(shared);
  return request;
}

std::string SimVisitor::Strange() {
  v1::GenerateRequest request = Good();
  request.mutable_sampling()->clear_seed();  // It would say whose it is, and some byte is wrong.
  const auto draw = [this](uint64_t below) { return cluster_->Draw() % below; };
  const uint32_t far = kVocabulary + static_cast<uint32_t>(draw(1u << 30));
  switch (draw(10)) {
    case 0:
      request.mutable_tokens()->set_ids(draw(request.tokens().ids_size()), far);
      break;
    case 1:
      for (int i = 0; i < cluster_->turn_options.limits.max_prompt_tokens; ++i) request.mutable_tokens()->add_ids(1);
      break;
    case 2:
      request.set_max_tokens(cluster_->turn_options.limits.max_generated_tokens + 1 + draw(1u << 30));
      break;
    case 3:
      request.add_stop_token_ids(far);
      break;
    case 4:
      for (int i = 0; i < router::kMaxStopTokenIds + 1; ++i) request.add_stop_token_ids(i);
      break;
    case 5:
      request.mutable_sampling()->set_temperature(draw(2) == 0 ? std::numeric_limits<float>::quiet_NaN()
                                                               : -std::numeric_limits<float>::infinity());
      break;
    case 6:
      for (int i = 0; i < router::kMaxPrefixEnds + 1; ++i) request.add_prefix_ends(draw(60));
      break;
    case 7:
      (*request.mutable_sampling()->mutable_logit_bias())[far] = 1;
      break;
    case 8:
      request.set_session_id(std::string(draw(300), draw(2) == 0 ? 'x' : '\n'));
      request.set_request_id(std::string(draw(300), 'y'));
      break;
    case 9:
      request.set_initial_state("no such state");
      break;
  }
  std::string bytes = request.SerializeAsString();
  if (cluster_->Chance(0.5)) return bytes;
  for (uint64_t i = 0; i <= draw(8); ++i) bytes[draw(bytes.size())] ^= static_cast<char>(1 << draw(8));
  if (cluster_->Chance(0.3)) bytes.resize(draw(bytes.size()));
  return bytes;
}

void SimVisitor::Next(absl::Duration pause) {
  cluster_->time.After(pause, [this, visit = visit_] {
    if (visit != visit_ || done()) return;
    // Beside the one that it waits for.
    if (cluster_->strangers > 0) Call(Strange(), nullptr);
    request_ = Good();
    const absl::Span<const uint32_t> input(request_.tokens().ids().data(), request_.tokens().ids_size());
    expected_.clear();
    for (int family = 0; family < cluster_->families; ++family) {
      const v1::Sampling sampling = OfFamily(request_.sampling(), family);
      expected_.push_back(
          worker::FakeModel::Generate(input, static_cast<int>(request_.max_tokens()), sampling, kVocabulary));
    }
    attempt_ = std::make_shared<Attempt>();
    received_ = 0;
    heard_at_ = cluster_->time.Now();
    Call(request_.SerializeAsString(), attempt_);
    Watch(attempt_);
  });
}

void SimVisitor::Call(const std::string& bytes, std::shared_ptr<Attempt> attempt) {
  const bool is_good = attempt != nullptr;
  if (!is_good) attempt = std::make_shared<Attempt>();
  attempt->router = cluster_->AnyRouter();
  SimRouter& router = *cluster_->routers[attempt->router];
  attempt->router_life = router.life();
  attempt->call = cluster_->next_call++;
  const absl::Duration delay = cluster_->NetworkDelay();
  if (!router.alive()) {
    cluster_->time.After(delay, [this, attempt] { Closed(attempt, absl::UnavailableError("nobody is there")); });
    return;
  }
  router.Deliver(delay, [this, attempt, is_good, bytes, &router] {
    if (const absl::Status status = Enter(attempt, bytes, router); !status.ok()) {
      // B2: what is wrong is refused for what it is.
      const bool is_known = absl::IsInvalidArgument(status) || absl::IsNotFound(status);
      if (is_good || !is_known) cluster_->Violated(absl::StrCat("B2: a call is refused with ", status.ToString()));
    }
  });
}

absl::Status SimVisitor::Enter(const std::shared_ptr<Attempt>& attempt, const std::string& bytes, SimRouter& router) {
  v1::GenerateRequest request;
  if (!request.ParseFromString(bytes)) return absl::InvalidArgumentError("no request");
  absl::StatusOr<router::TurnInput> input =
      cluster_->options.broken.door_checks_nothing
          ? AsItIs(request)
          : MakeTurnInput(request, *cluster_->model, cluster_->turn_options.limits, cluster_->Draw());
  if (!input.ok()) return input.status();
  auto turn = std::make_shared<router::Turn>();
  turn->kind = std::make_unique<router::GenerateCall>(std::make_shared<Stream>(cluster_, this, attempt));
  turn->call = attempt->call;
  turn->model = cluster_->model;
  turn->tenant = tenant_;
  // Of nobody's else, whatever the bytes say.
  if (!input->session_id.empty()) turn->session_id = common::ScopedId("stranger", input->session_id);
  turn->named = !input->request_id.empty();
  turn->request_id = turn->named ? input->request_id : absl::StrCat("auto-", attempt->call);
  turn->prompt = std::move(input->tokens);
  turn->input_field = std::move(input->input_field);
  turn->spec = std::move(input->spec);
  turn->resume_from = input->resume_from;
  turn->prefix.marks = std::move(input->prefix_ends);
  turn->arrival = router.Now();
  attempt->turn = turn;
  router.core->Arrive(turn);
  return absl::OkStatus();
}

void SimVisitor::Heard(const std::shared_ptr<Attempt>& attempt, const v1::GenerateResponse& message) {
  if (attempt != attempt_ || attempt->over) return;
  heard_at_ = cluster_->time.Now();
  cluster_->time.Mix(message.SerializeAsString());
  if (message.has_finish()) {
    attempt->over = true;
    const v1::Finish& finish = message.finish();
    if (finish.reason() != v1::FINISH_REASON_LENGTH || received_ != request_.max_tokens()) {
      return cluster_->Violated(absl::StrCat("T3: a visit ended after ", received_, " tokens"));
    }
    if (finish.reused_tokens() >= static_cast<uint64_t>(request_.tokens().ids_size())) {
      return cluster_->Violated(absl::StrCat("N1: ", finish.reused_tokens(), " tokens are said to be reused"));
    }
    cluster_->reused_tokens += finish.reused_tokens();
    ++visit_;
    return Next(cluster_->Between(absl::Milliseconds(1), absl::Milliseconds(300)));
  }
  if (message.index() != received_) {
    return cluster_->Violated(absl::StrCat("T1: index ", message.index(), " where ", received_, " is next"));
  }
  bool is_expected = false;
  for (std::vector<uint32_t>& one : expected_) {
    if (received_ < one.size() && one[received_] == message.token_id()) {
      is_expected = true;
    } else {
      one.clear();  // A turn stays in one family.
    }
  }
  if (!is_expected) return cluster_->Violated(NotUndisturbed(attempt->turn, received_, "a visit"));
  ++received_;
  ++cluster_->tokens;
}

void SimVisitor::Closed(const std::shared_ptr<Attempt>& attempt, const absl::Status& status) {
  cluster_->time.Mix(status.ToString());
  if (attempt != attempt_ || attempt->over || status.ok()) return;
  attempt->over = true;
  if (!absl::IsUnavailable(status) && !absl::IsAborted(status) && !absl::IsResourceExhausted(status) &&
      !absl::IsCancelled(status)) {
    return cluster_->Violated(absl::StrCat("T3: a visit ended with ", status.ToString()));
  }
  Next(std::max(common::GetRetryDelay(status).value_or(absl::ZeroDuration()), absl::Milliseconds(20)));
}

void SimVisitor::Watch(const std::shared_ptr<Attempt>& attempt) {
  cluster_->time.After(absl::Milliseconds(200), [this, attempt] {
    if (attempt->over || attempt != attempt_) return;
    if (!GivesUp(cluster_, *attempt, heard_at_)) return Watch(attempt);
    Closed(attempt, absl::UnavailableError("the connection is lost"));
  });
}

}  // namespace rwkv::simulator
