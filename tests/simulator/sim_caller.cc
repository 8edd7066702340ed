// Calls that generate nothing: inputs that are scored, embedded and looked at, sessions that are exported.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/router/core/call_kinds.h"
#include "services/worker/client/fake_worker.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
namespace {

using worker::FakeModel;

constexpr absl::Duration kDelay = absl::Microseconds(400);
// As long as a client waits for a connection over which nothing comes.

constexpr const char* kKindNames[] = {"score",          "document", "logits",   "mean embedding",
                                      "last embedding", "export",   "exclusive"};
constexpr int kKinds = 7;

// What a caller may try again; an export's snapshot may also be lost on its way.
bool MayPass(const absl::Status& status, bool is_export) {
  return absl::IsUnavailable(status) || absl::IsAborted(status) || absl::IsResourceExhausted(status) ||
         absl::IsCancelled(status) || (is_export && (absl::IsDeadlineExceeded(status) || absl::IsDataLoss(status)));
}

}  // namespace

// Messages on their way from a router to the caller.
template <typename Response>
class SimCaller::Stream final : public router::ResponseStream<Response> {
 public:
  Stream(SimCaller* caller, std::shared_ptr<Attempt> attempt) : caller_(caller), attempt_(std::move(attempt)) {}

  void Send(Response response) override {
    caller_->FromRouter(*attempt_, [caller = caller_, attempt = attempt_, response = std::move(response)] {
      caller->Heard(attempt, response);
    });
  }
  size_t queued() const override { return 0; }
  void OnRoom(std::function<void()> on_room) override { on_room(); }
  void Close(absl::Status status) override {
    caller_->FromRouter(*attempt_, [caller = caller_, attempt = attempt_, status] { caller->Closed(attempt, status); });
  }

 private:
  SimCaller* const caller_;
  const std::shared_ptr<Attempt> attempt_;
};

SimCaller::SimCaller(Cluster* cluster, int index, const std::string& tenant, int calls)
    : cluster_(cluster), index_(index), calls_(calls), tenant_(tenant) {}

std::string SimCaller::Name() const {
  return absl::StrCat("call ", call_, " (", kKindNames[static_cast<int>(kind_)], ")");
}

void SimCaller::FromRouter(const Attempt& attempt, std::function<void()> message) {
  const SimRouter& router = *cluster_->routers[attempt.router];
  if (router.alive() && router.life() == attempt.router_life) cluster_->time.After(kDelay, std::move(message));
}

// As the model says it of every prefix of `input_`.
std::vector<float> SimCaller::Undisturbed(int family) const {
  std::vector<float> values;
  uint64_t state = FakeModel::Fresh();
  float sum = 0;
  for (size_t i = 0; i < input_.size(); ++i) {
    state = FakeModel::Feed(state, input_[i]);
    const float hidden = ModelValue(state, kVocabulary, family);
    sum += hidden;
    if (kind_ == Kind::kLogits) values.push_back(hidden);
    const bool is_scored = kind_ == Kind::kScore || kind_ == Kind::kDocument;
    if (is_scored && i + 1 < input_.size()) values.push_back(ModelValue(state, input_[i + 1], family));
    if (kind_ == Kind::kLastEmbedding && i + 1 == input_.size()) values.push_back(hidden);
  }
  if (kind_ == Kind::kMeanEmbedding) values.push_back(sum / static_cast<float>(input_.size()));
  return values;
}

void SimCaller::Next(absl::Duration pause) {
  cluster_->time.After(pause, [this, call = call_] {
    if (call != call_ || done()) return;
    kind_ = static_cast<Kind>(cluster_->Draw() % kKinds);
    input_.clear();
    const int tokens = 2 + static_cast<int>(cluster_->Draw() % 30);
    for (int i = 0; i < tokens; ++i) input_.push_back((index_ * 211 + call_ * 37 + i * 3) % kVocabulary);
    received_ = 0;
    expected_.clear();
    for (int family = 0; family < cluster_->families; ++family) expected_.push_back(Undisturbed(family));
    expected_count_ = expected_.front().size();
    heard_at_ = cluster_->time.Now();
    attempt_ = std::make_shared<Attempt>();
    Call(attempt_);
    Watch(attempt_);
  });
}

void SimCaller::TakeSession(router::Turn* turn) const {
  const SimClient& client = *cluster_->clients[cluster_->Draw() % cluster_->clients.size()];
  turn->prompt.clear();
  turn->session_id = client.session();
  turn->tenant = client.tenant();
}

std::unique_ptr<router::CallKind> SimCaller::MakeKind(const std::shared_ptr<Attempt>& attempt, router::Turn* turn) {
  const auto answered = [this, attempt](auto answer) {
    FromRouter(*attempt, [this, attempt, answer = std::move(answer)] {
      if (attempt != attempt_ || attempt->over) return;
      if (answer.ok()) Heard(attempt, *answer);
      if (!attempt->over) Closed(attempt, answer.status());
    });
  };
  switch (kind_) {
    case Kind::kScore: {
      auto score = std::make_unique<router::ScoreCall>(answered);
      score->TakeLast(&turn->prompt);
      return score;
    }
    case Kind::kDocument: {
      auto document =
          std::make_unique<router::DocumentCall>(std::make_shared<Stream<v1::ScoreDocumentResponse>>(this, attempt));
      document->TakeLast(&turn->prompt);
      return document;
    }
    case Kind::kLogits:
      return std::make_unique<router::LogitsCall>(std::make_shared<Stream<v1::LogitsResponse>>(this, attempt));
    case Kind::kMeanEmbedding:
    case Kind::kLastEmbedding: {
      v1::EmbedRequest request;
      request.set_source(kind_ == Kind::kMeanEmbedding ? v1::EMBED_SOURCE_HIDDEN_MEAN : v1::EMBED_SOURCE_HIDDEN_LAST);
      return std::make_unique<router::EmbedCall>(request, answered);
    }
    case Kind::kExport:
      TakeSession(turn);
      return std::make_unique<router::ExportCall>(
          [this, answered, session = turn->session_id, asked = cluster_->store.session(turn->session_id).log.size(),
           branch = cluster_->store.session(turn->session_id).branch](absl::StatusOr<router::ExportedState> exported) {
            const bool is_cut = cluster_->store.session(session).branch != branch;
            if (exported.ok() && !is_cut) CheckExport(session, asked, exported->manifest);
            answered(std::move(exported));
          });
    case Kind::kExclusive:
      TakeSession(turn);
      // T2: from the lease to the change nobody else writes, or the store says that the position is not the log's end.
      return std::make_unique<router::ExclusiveCall>(
          [this](const v1::AcquireLeaseResponse& held) {
            v1::RewindSessionRequest rewind;
            *rewind.mutable_lease() = held.lease();
            rewind.set_log_branch(held.log_branch());
            rewind.set_position(held.session().token_count());
            return cluster_->store.RewindSession(rewind, absl::InfiniteFuture()).status();
          },
          false,
          [this, attempt](const absl::Status& status) {
            FromRouter(*attempt, [this, attempt, status] { Closed(attempt, status); });
          });
  }
  return nullptr;
}

// S1: it is the state after all of the log as it was at some time since it was asked for.
void SimCaller::CheckExport(const std::string& session_id, uint64_t asked, const v1::SnapshotManifest& manifest) {
  const ModelStore::SessionRow& session = cluster_->store.session(session_id);
  if (manifest.position() > session.log.size() || manifest.position() < asked) {
    return cluster_->Violated(absl::StrCat("S1: an export of ", session_id, " at ", manifest.position(),
                                           " of a log of ", session.log.size()));
  }
  const uint64_t* const state = cluster_->store.FindState(manifest.snapshot_id());
  if (state == nullptr || cluster_->store.IsDamaged(manifest.snapshot_id())) return;
  if (*state != FakeModel::Feed(FakeModel::Fresh(), {session.log.data(), manifest.position()})) {
    cluster_->Violated(
        absl::StrCat("S1: an export of ", session_id, " at ", manifest.position(), " is not the state after its log"));
  }
}

void SimCaller::Call(const std::shared_ptr<Attempt>& attempt) {
  attempt->router = cluster_->AnyRouter();
  SimRouter& router = *cluster_->routers[attempt->router];
  attempt->router_life = router.life();
  attempt->call = cluster_->next_call++;
  const absl::Duration delay = cluster_->NetworkDelay();
  if (!router.alive()) {
    cluster_->time.After(delay, [this, attempt] { Closed(attempt, absl::UnavailableError("nobody is there")); });
    return;
  }
  auto turn = std::make_shared<router::Turn>();
  turn->prompt = input_;
  turn->tenant = tenant_;
  turn->kind = MakeKind(attempt, turn.get());
  turn->call = attempt->call;
  turn->model = cluster_->model;
  turn->input_field = "tokens.ids";
  router.Deliver(delay, [&router, turn] {
    turn->arrival = router.Now();
    router.core->Arrive(turn);
  });
}

bool SimCaller::Take(float value) {
  bool is_expected = false;
  for (std::vector<float>& one : expected_) {
    if (received_ < one.size() && one[received_] == value) {
      is_expected = true;
    } else {
      one.clear();  // A call stays in one family.
    }
  }
  ++received_;
  if (!is_expected) {
    cluster_->Violated(absl::StrCat("T3: value ", received_ - 1, " of ", Name(), " is not that of an undisturbed run"));
  }
  return is_expected;
}

template <typename Values>
void SimCaller::TakeAll(const std::shared_ptr<Attempt>& attempt, uint64_t first, const Values& values) {
  if (attempt != attempt_ || attempt->over) return;
  heard_at_ = cluster_->time.Now();
  if (first != received_) {
    return cluster_->Violated(absl::StrCat("T1: value ", first, " of ", Name(), " where ", received_, " is next"));
  }
  for (const float value : values) {
    if (!Take(value)) return;
  }
}

void SimCaller::Heard(const std::shared_ptr<Attempt>& attempt, const v1::ScoreResponse& answer) {
  if (!std::equal(input_.begin(), input_.end(), answer.token_ids().begin(), answer.token_ids().end())) {
    return cluster_->Violated(absl::StrCat("T3: ", Name(), " is of other tokens"));
  }
  TakeAll(attempt, 0, answer.logprobs());
}

void SimCaller::Heard(const std::shared_ptr<Attempt>& attempt, const v1::ScoreDocumentResponse& answer) {
  TakeAll(attempt, answer.first() - 1, answer.logprobs());
}

void SimCaller::Heard(const std::shared_ptr<Attempt>& attempt, const v1::LogitsResponse& answer) {
  std::vector<float> firsts(answer.rows());
  for (size_t row = 0; row < firsts.size(); ++row) {
    std::memcpy(&firsts[row], answer.logits().data() + row * kVocabulary * sizeof(float), sizeof(float));
  }
  TakeAll(attempt, answer.first_row(), firsts);
}

void SimCaller::Heard(const std::shared_ptr<Attempt>& attempt, const v1::EmbedResponse& answer) {
  TakeAll(attempt, 0, answer.values());
}

void SimCaller::Heard(const std::shared_ptr<Attempt>& /*attempt*/, const router::ExportedState& /*answer*/) {}

void SimCaller::Closed(const std::shared_ptr<Attempt>& attempt, const absl::Status& status) {
  if (attempt != attempt_ || attempt->over) return;
  attempt->over = true;
  cluster_->time.Mix(received_);
  cluster_->time.Mix(status.ToString());
  if (status.ok()) {
    if (received_ != expected_count_) {
      return cluster_->Violated(absl::StrCat("T3: ", Name(), " ended after ", received_, " values"));
    }
    ++call_;
    return Next(cluster_->Between(absl::Milliseconds(1), absl::Milliseconds(300)));
  }
  if (!MayPass(status, kind_ == Kind::kExport)) {
    return cluster_->Violated(absl::StrCat("T3: ", Name(), " ended with ", status.ToString()));
  }
  Next(std::max(common::GetRetryDelay(status).value_or(absl::ZeroDuration()), absl::Milliseconds(20)));
}

void SimCaller::Watch(const std::shared_ptr<Attempt>& attempt) {
  cluster_->time.After(absl::Milliseconds(200), [this, attempt] {
    if (attempt->over || attempt != attempt_) return;
    if (!GivesUp(cluster_, *attempt, heard_at_)) return Watch(attempt);
    Closed(attempt, absl::UnavailableError("the connection is lost"));
  });
}

}  // namespace rwkv::simulator
