// Sessions that leave one cluster in a file and go on in another, as real processes, over the command line.
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/client/router_client.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::SizeIs;

using Tokens = std::vector<uint32_t>;

const Tokens kPrompt = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 93, 23};
const Tokens kSecondPrompt = {84, 62, 64, 33};

testing::RandomModelOptions Model() {
  testing::RandomModelOptions options;
  options.layers = 4;
  options.vocab_size = 101;
  return options;
}

std::string Path(const std::string& name) { return absl::StrCat(::testing::TempDir(), "/", name); }

std::unique_ptr<LocalCluster> StartCluster(const std::string& model, int stages) {
  LocalCluster::Options options;
  options.model = model;
  options.stages = stages;
  auto cluster = LocalCluster::Start(options);
  EXPECT_OK(cluster);
  return cluster.ok() ? *std::move(cluster) : nullptr;
}

struct Output {
  int exit_status = -1;
  std::string text;  // Of both streams.
};
Output Rwkvctl(const LocalCluster& cluster, const std::string& arguments) {
  const std::string command = absl::StrCat(testing::Runfile("services/rwkvctl/rwkvctl"), " --router ",
                                           cluster.router_address(), " ", arguments, " 2>&1");
  Output output;
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[4096];
  for (size_t count; (count = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output.text.append(buffer, count);
  output.exit_status = WEXITSTATUS(pclose(pipe));
  return output;
}

v1::GenerateRequest Turn(const std::string& session, const std::string& request_id, const Tokens& prompt,
                         bool sampled) {
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(request_id);
  request.mutable_tokens()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_tokens(60);
  if (sampled) {
    request.mutable_sampling()->set_temperature(0.9f);
    request.mutable_sampling()->set_seed(17);
    request.mutable_sampling()->set_frequency_penalty(0.3f);
  }
  return request;
}

absl::StatusOr<Tokens> Generate(
    RouterClient& client, const v1::GenerateRequest& request,
    const std::function<absl::Status(size_t)>& on_token = [](size_t) { return absl::OkStatus(); }) {
  Tokens tokens;
  RWKV_RETURN_IF_ERROR(client.Generate(request, [&](const v1::GenerateResponse& response) -> absl::Status {
    if (!response.has_token_id()) return absl::OkStatus();
    tokens.push_back(response.token_id());
    return on_token(tokens.size());
  }));
  return tokens;
}

absl::Status Fork(RouterClient& client, const std::string& id, absl::optional<uint64_t> position,
                  const std::string& new_id) {
  v1::SessionsForkRequest fork;
  fork.set_session_id(id);
  if (position.has_value()) fork.set_position(*position);
  fork.set_new_session_id(new_id);
  // A store that was just restarted is found again within a second.
  absl::Status status;
  (void)testing::WaitUntil([&] {
    status = client.ForkSession(fork).status();
    return !absl::IsUnavailable(status);
  });
  return status;
}

class ImportTest : public ::testing::Test {
 protected:
  // What the session says next, greedy and sampled, each in a fork that shares all of it.
  void ExpectContinuations(LocalCluster& cluster, const std::string& session, const std::string& name,
                           const std::function<absl::Status()>& disturb = nullptr) {
    SCOPED_TRACE(absl::StrCat(session, ", ", name));
    const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster.Channel("router-0"));
    for (const bool sampled : {false, true}) {
      const std::string fork = absl::StrCat(session, "-", name, sampled ? "-sampled" : "-greedy");
      ASSERT_OK(Fork(*client, session, absl::nullopt, fork));
      const auto on_token = [&](size_t count) {
        return count == 5 && disturb != nullptr ? disturb() : absl::OkStatus();
      };
      EXPECT_THAT(Generate(*client, Turn(fork, "turn", kSecondPrompt, sampled), on_token),
                  IsOkAndHolds(ElementsAreArray(expected_[sampled])));
    }
  }

  Tokens expected_[2];  // Greedy, sampled.
};

TEST_F(ImportTest, AnExportGoesOnWithTheSameTokensOnAnotherClusterWhoeverIsKilled) {
  const std::string model = Path("model.safetensors");
  ASSERT_OK(testing::WriteRandomModel(Model(), model));
  const std::string with_log = Path("with_log.safetensors");
  const std::string without_log = Path("without_log.safetensors");
  uint64_t position = 0;
  {
    const std::unique_ptr<LocalCluster> cluster = StartCluster(model, 1);
    ASSERT_NE(cluster, nullptr);
    const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
    ASSERT_OK(client->CreateSession([] {
      v1::SessionsCreateRequest create;
      create.set_session_id("s");
      return create;
    }()));
    ASSERT_OK(Generate(*client, Turn("s", "first", kPrompt, true)));
    position = kPrompt.size() + 60;
    const Output exported = Rwkvctl(*cluster, absl::StrCat("sessions export s ", with_log));
    ASSERT_EQ(exported.exit_status, 0) << exported.text;
    EXPECT_THAT(exported.text, HasSubstr(absl::StrCat("at position ", position, " to ")));
    const Output state = Rwkvctl(*cluster, absl::StrCat("state --session s --out ", without_log));
    ASSERT_EQ(state.exit_status, 0) << state.text;
    for (const bool sampled : {false, true}) {
      const std::string fork = sampled ? "sampled" : "greedy";
      ASSERT_OK(Fork(*client, "s", absl::nullopt, fork));
      ASSERT_OK_AND_ASSIGN(expected_[sampled], Generate(*client, Turn(fork, "turn", kSecondPrompt, sampled)));
      ASSERT_THAT(expected_[sampled], SizeIs(60));
    }
    // Back where it came from.
    ASSERT_EQ(Rwkvctl(*cluster, absl::StrCat("sessions import ", with_log, " --session again")).text, "again\n");
    ExpectContinuations(*cluster, "again", "here");
  }

  const std::unique_ptr<LocalCluster> cluster = StartCluster(model, 2);
  ASSERT_NE(cluster, nullptr);
  std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  ASSERT_EQ(Rwkvctl(*cluster, absl::StrCat("sessions import ", with_log, " --session log")).text, "log\n");
  const Output based = Rwkvctl(*cluster, absl::StrCat("sessions import ", without_log, " --session base"));
  EXPECT_THAT(based.text, HasSubstr(absl::StrCat("before position ", position)));
  EXPECT_TRUE(absl::EndsWith(based.text, "base\n")) << based.text;
  const Output twice = Rwkvctl(*cluster, absl::StrCat("sessions import ", with_log, " --session log"));
  EXPECT_EQ(twice.exit_status, 1);
  EXPECT_THAT(twice.text, HasSubstr("ALREADY_EXISTS"));

  for (const std::string session : {"log", "base"}) {
    ExpectContinuations(*cluster, session, "undisturbed");
    for (const std::string& process : cluster->process_names()) {
      ExpectContinuations(*cluster, session, absl::StrCat("kill-", process), [&]() -> absl::Status {
        RWKV_RETURN_IF_ERROR(cluster->Kill(process));
        return cluster->Restart(process);
      });
      ASSERT_OK(cluster->WaitUntilServing());
    }
    ASSERT_OK(cluster->KillAll());
    ASSERT_OK(cluster->RestartAll());
    ASSERT_OK(cluster->WaitUntilServing());
    ExpectContinuations(*cluster, session, "killed");

    // The session itself: a turn, taken back.
    client = MakeRouterClient(cluster->Channel("router-0"));
    EXPECT_THAT(Generate(*client, Turn(session, "a", kSecondPrompt, false)),
                IsOkAndHolds(ElementsAreArray(expected_[0])));
    v1::SessionsRewindRequest rewind;
    rewind.set_session_id(session);
    rewind.set_position(position);
    ASSERT_OK(client->RewindSession(rewind));
    EXPECT_THAT(Generate(*client, Turn(session, "b", kSecondPrompt, true)),
                IsOkAndHolds(ElementsAreArray(expected_[1])));
    rewind.set_position(position - 1);
    const absl::Status before = client->RewindSession(rewind).status();
    if (session == "log") {
      EXPECT_OK(before);
    } else {
      EXPECT_THAT(before, StatusIs(absl::StatusCode::kOutOfRange,
                                   HasSubstr(absl::StrCat("imported state at position ", position))));
    }
  }
  // With its log it is rebuilt from any position.
  ASSERT_OK(Fork(*client, "log", 5, "early"));
  const Tokens rest(kPrompt.begin() + 5, kPrompt.end());
  ASSERT_OK_AND_ASSIGN(const Tokens whole, Generate(*client, Turn("", "", kPrompt, false)));
  EXPECT_THAT(Generate(*client, Turn("early", "r", rest, false)), IsOkAndHolds(ElementsAreArray(whole)));
}

TEST_F(ImportTest, ATunedStateIsImportedWhileTheClusterRuns) {
  testing::RandomModelOptions options = Model();
  const std::string plain = Path("plain.safetensors");
  ASSERT_OK(testing::WriteRandomModel(options, plain));
  options.time_state = true;
  const std::string tuned = Path("tuned.safetensors");
  ASSERT_OK(testing::WriteRandomModel(options, tuned));
  ASSERT_OK_AND_ASSIGN(const std::vector<testing::RawTensor> tensors, testing::MakeRandomModel(options));
  std::vector<testing::RawTensor> states;
  for (const testing::RawTensor& tensor : tensors) {
    if (absl::EndsWith(tensor.spec.name, "time_state")) states.push_back(tensor);
  }
  const std::string file = Path("poet.pth");
  ASSERT_OK(testing::WriteFileAtomically(file, testing::TorchZipBytes(states)));
  {
    const std::unique_ptr<LocalCluster> cluster = StartCluster(tuned, 1);
    ASSERT_NE(cluster, nullptr);
    const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
    for (const bool sampled : {false, true}) {
      ASSERT_OK_AND_ASSIGN(expected_[sampled], Generate(*client, Turn("", "", kSecondPrompt, sampled)));
    }
  }
  const std::unique_ptr<LocalCluster> cluster = StartCluster(plain, 2);
  ASSERT_NE(cluster, nullptr);
  ASSERT_EQ(Rwkvctl(*cluster, absl::StrCat("sessions import ", file, " --session poet")).text, "poet\n");
  ExpectContinuations(*cluster, "poet", "undisturbed");
  ExpectContinuations(*cluster, "poet", "killed", [&]() -> absl::Status {
    RWKV_RETURN_IF_ERROR(cluster->Kill("worker-1"));
    return cluster->Restart("worker-1");
  });

  // A state of one model is none of another's, and what is no state is no session.
  const std::string exported = Path("exported.safetensors");
  ASSERT_OK(cluster->WaitUntilServing());  // Who was killed may have been back only after the turn.
  const Output output = Rwkvctl(*cluster, absl::StrCat("sessions export poet ", exported));
  ASSERT_EQ(output.exit_status, 0) << output.text;
  ASSERT_EQ(Rwkvctl(*cluster, absl::StrCat("sessions import ", exported, " --session again")).text, "again\n");
  ExpectContinuations(*cluster, "again", "undisturbed");
  ASSERT_OK(cluster->Stop());
  const std::unique_ptr<LocalCluster> other = StartCluster(tuned, 1);
  ASSERT_NE(other, nullptr);
  const Output refused = Rwkvctl(*other, absl::StrCat("sessions import ", exported));
  EXPECT_EQ(refused.exit_status, 1);
  EXPECT_THAT(refused.text, HasSubstr("FAILED_PRECONDITION"));
  EXPECT_THAT(refused.text, HasSubstr("it is a state of the model with fingerprint"));
  const Output model = Rwkvctl(*other, absl::StrCat("sessions import ", plain));
  EXPECT_EQ(model.exit_status, 1);
  EXPECT_EQ(Rwkvctl(*other, "sessions list --json").text, "[]\n");
}

}  // namespace
}  // namespace rwkv
