// A turn that its worker decodes by itself is disturbed in each of its phases: whoever is killed or stopped then, its
// stream and the session's next turn are those of an undisturbed run.
#include <signal.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/router_client.h"
#include "tests/testing/conversations.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::router::RouterClient;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::Runfile;

constexpr absl::Duration kLimit = absl::Seconds(60);  // Of a turn and its disturbance.
constexpr absl::Duration kStopped = absl::Milliseconds(150);
constexpr uint32_t kPromptTokens = 14;
constexpr uint32_t kTokens = 90;
constexpr uint32_t kSnapshotInterval = 64;

enum class Phase {
  kGranted,     // The first token was drawn here; from then on the worker feeds what it draws.
  kRunning,     // In the middle of what it may do.
  kHandedBack,  // It has come as far as it may before a snapshot.
  kStopString,  // It waits behind a token that may complete a stop string, and does.
  kCancelled,   // The client has gone, and is back when the fault is over.
  kEnded,       // The client has all, and the state is on its way to the store.
};
constexpr Phase kPhases[] = {Phase::kGranted,    Phase::kRunning,   Phase::kHandedBack,
                             Phase::kStopString, Phase::kCancelled, Phase::kEnded};
constexpr const char* kPhaseNames[] = {"granted", "running", "handed back", "stop string", "cancelled", "ended"};

struct Answer {
  std::vector<uint32_t> tokens;
  std::string text;
  v1::Finish finish;
};

v1::GenerateRequest Turn(const std::string& session, int number, const std::string& stop) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(absl::StrCat("turn-", number));
  for (uint32_t i = 0; i < kPromptTokens; ++i) request.mutable_tokens()->add_ids(40 + (17 * number + 5 * i) % 200);
  request.mutable_sampling()->set_temperature(2);
  request.mutable_sampling()->set_seed(5);
  request.set_ignore_end_of_text(true);
  request.set_max_tokens(kTokens);
  if (!stop.empty()) request.add_stop(stop);
  return request;
}

class GoOnTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    testing::RandomModelOptions model;
    model.layers = 4;
    model.vocab_size = 308;
    LocalCluster::Options options;
    options.model = absl::StrCat(::testing::TempDir(), "/go_on.safetensors");
    ASSERT_OK(testing::WriteRandomModel(model, options.model));
    options.stages = 2;
    options.worker_flags = {"--slots=4", "--threads=1"};
    options.router_flags = {"--lease_ttl=3s", absl::StrCat("--snapshot_interval_tokens=", kSnapshotInterval),
                            absl::StrCat("--tokenizer=", Runfile("services/tokenizer/testdata/small_vocabulary.txt"))};
    auto cluster = LocalCluster::Start(options);
    ASSERT_THAT(cluster, IsOk());
    cluster_ = *std::move(cluster);
    client_ = testing::PatientClient(*cluster_);
  }

  void CreateSession(const std::string& id) {
    v1::SessionsCreateRequest create;
    create.set_session_id(id);
    absl::Status status;
    const auto answered = [&] {
      status = client_->CreateSession(create).status();
      return !absl::IsUnavailable(status);
    };
    (void)testing::WaitUntil(answered, kLimit);
    ASSERT_OK(status);
  }

  // A turn to its end, however often it is asked for again. `on_message` may end a call; then it is asked for again,
  // too, behind `again`.
  absl::StatusOr<Answer> Generate(
      v1::GenerateRequest request,
      const std::function<absl::Status(const Answer&)>& on_message = [](const Answer&) { return absl::OkStatus(); },
      const std::function<void()>& again = [] {}) {
    Answer answer;
    absl::Status status;
    const auto ended = [&] {
      status = client_->Generate(request, [&](const v1::GenerateResponse& response) -> absl::Status {
        if (response.index() != answer.tokens.size()) {
          return absl::DataLossError(absl::StrCat("index ", response.index(), " after ", answer.tokens.size()));
        }
        answer.text += response.text();
        if (response.has_token_id()) answer.tokens.push_back(response.token_id());
        if (response.has_finish()) answer.finish = response.finish();
        return on_message(answer);
      });
      const bool may_pass = absl::IsUnavailable(status) || absl::IsAborted(status) || absl::IsCancelled(status);
      if (!may_pass) return true;
      again();
      request.set_resume_from(answer.tokens.size());
      return false;
    };
    (void)testing::WaitUntil(ended, kLimit);
    if (!status.ok()) return status;
    return answer;
  }

  // What a session of its own says undisturbed; `stop`: of the first turn.
  void Undisturbed(const std::string& session, const std::string& stop, std::vector<Answer>* answers) {
    CreateSession(session);
    for (int turn = 0; turn < 2; ++turn) {
      const absl::StatusOr<Answer> answer = Generate(Turn(session, turn, turn == 0 ? stop : ""));
      ASSERT_THAT(answer, IsOk());
      answers->push_back(*answer);
    }
  }

  // Something of the text's second half that is nowhere before; what is over when it is found is not at the token's end.
  static std::string StopIn(const std::string& text) {
    for (size_t begin = text.size() / 2; begin + 3 < text.size(); ++begin) {
      const std::string stop = text.substr(begin, 3);
      if (std::all_of(stop.begin(), stop.end(), absl::ascii_isprint) && text.find(stop) == begin) return stop;
    }
    return "";
  }

  void Strike(const std::string& victim, int signal) {
    if (signal == SIGKILL) {
      ASSERT_OK(cluster_->Kill(victim));
      ASSERT_OK(cluster_->Restart(victim));
    } else {
      ASSERT_OK(cluster_->Freeze(victim));
      absl::SleepFor(kStopped);  // The fault itself: nothing is waited for.
      ASSERT_OK(cluster_->Thaw(victim));
    }
  }

  void Disturb(Phase phase, const std::string& victim, int signal) {
    const std::string session = absl::StrCat(static_cast<int>(phase), "-", victim, "-", signal);
    CreateSession(session);
    const std::vector<Answer>& expected = phase == Phase::kStopString ? stopped_ : plain_;
    const size_t at = phase == Phase::kGranted      ? 1
                      : phase == Phase::kHandedBack ? kSnapshotInterval - kPromptTokens
                      : phase == Phase::kStopString ? expected[0].tokens.size() - 1
                                                    : 25;
    bool struck = false;
    const auto strike = [&] {
      if (!std::exchange(struck, true)) Strike(victim, signal);
    };
    const auto on_message = [&](const Answer& answer) {
      const bool is_ended = answer.finish.reason() != v1::FINISH_REASON_UNSPECIFIED;
      if (struck || (phase == Phase::kEnded ? !is_ended : answer.tokens.size() < at)) return absl::OkStatus();
      if (phase == Phase::kCancelled) return absl::CancelledError("the client goes");
      strike();
      return absl::OkStatus();
    };
    for (int turn = 0; turn < 2; ++turn) {
      const std::string stop = turn == 0 && phase == Phase::kStopString ? stop_ : "";
      const absl::StatusOr<Answer> answer = Generate(Turn(session, turn, stop), on_message, strike);
      ASSERT_THAT(answer, IsOk()) << "turn " << turn;
      ASSERT_TRUE(struck);
      EXPECT_EQ(answer->tokens, expected[turn].tokens) << "turn " << turn;
      EXPECT_EQ(answer->finish.reason(), expected[turn].finish.reason());
      EXPECT_EQ(answer->finish.stop_string(), expected[turn].finish.stop_string());
    }
  }

  // Every phase, one after the other.
  void DisturbAll(const std::string& victim, int signal) {
    if (plain_.empty()) {
      Undisturbed("plain", "", &plain_);
      ASSERT_FALSE(HasFailure());
      stop_ = StopIn(plain_[0].text);
      ASSERT_FALSE(stop_.empty()) << absl::CHexEscape(plain_[0].text);
      Undisturbed("stopped", stop_, &stopped_);
      ASSERT_FALSE(HasFailure());
      ASSERT_EQ(stopped_[0].finish.reason(), v1::FINISH_REASON_STOP_STRING);
      ASSERT_GT(stopped_[0].tokens.size(), 2);
    }
    for (const Phase phase : kPhases) {
      SCOPED_TRACE(absl::StrCat(victim, ", signal ", signal, ", ", kPhaseNames[static_cast<int>(phase)]));
      Disturb(phase, victim, signal);
      if (HasFailure()) return;
    }
  }

  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<RouterClient> client_;
  std::vector<Answer> plain_, stopped_;  // Turns of an undisturbed session; the first without a stop string, and with.
  std::string stop_;
};

TEST_P(GoOnTest, AProcessIsKilledOrStopped) {
  for (const int signal : {SIGKILL, SIGSTOP}) DisturbAll(GetParam(), signal);
}

INSTANTIATE_TEST_SUITE_P(Victims, GoOnTest, ::testing::Values("worker-0", "worker-1", "router-0", "state_store-0"),
                         [](const auto& info) {
                           return absl::StrReplaceAll(info.param, {{"-", "_"}});
                         });

}  // namespace
}  // namespace rwkv
