#include "tests/testing/conversations.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "tests/testing/wait_until.h"

namespace rwkv::testing {
namespace {

// The session may be with a router that was lost; and one that is there may be without a pipeline or a store for a
// moment, or full.
bool MayPass(const absl::Status& status) {
  return absl::IsAborted(status) || absl::IsUnavailable(status) || absl::IsResourceExhausted(status);
}

}  // namespace

router::RouterClientOptions Patience() {
  router::RouterClientOptions options;
  options.max_resumes = 200;
  options.last_pause = absl::Milliseconds(200);
  return options;
}

std::unique_ptr<router::RouterClient> PatientClient(const LocalCluster& cluster, int first) {
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  const std::vector<std::string> routers = cluster.Names("router");
  for (size_t i = 0; i < routers.size(); ++i)
    channels.push_back(cluster.Channel(routers[(first + i) % routers.size()]));
  return router::MakeRouterClient(channels, Patience());
}

Conversations::~Conversations() { Stop(); }

absl::Status Conversations::CreateSession(router::RouterClient& client, const std::string& id) const {
  v1::SessionsCreateRequest create;
  create.set_session_id(id);
  absl::Status status;
  const auto answered = [&] {
    status = client.CreateSession(create).status();
    return !MayPass(status);
  };
  (void)WaitUntil(answered, options_.limit);
  // The answer to the call before may have been lost.
  return absl::IsAlreadyExists(status) ? absl::OkStatus() : status;
}

absl::StatusOr<Conversations::Tokens> Conversations::Turn(router::RouterClient& client, const std::string& name,
                                                          int story, int number, uint64_t* reused_tokens) {
  const int of_session = options_.turns_per_session > 0 ? number / options_.turns_per_session : 0;
  const bool is_first = of_session * options_.turns_per_session == number;
  const std::string session = absl::StrCat(name, "-", of_session);
  if (is_first) {
    const absl::Status created = CreateSession(client, session);
    if (!created.ok()) return created;
  }
  v1::GenerateRequest request;
  request.set_session_id(session);
  request.set_request_id(absl::StrCat("turn-", number));
  for (int i = 0; is_first && i < options_.shared_tokens; ++i) {
    request.mutable_tokens()->add_ids(static_cast<uint32_t>(i * i * 7 + i) % kVocabulary);
  }
  for (uint32_t i = 0; i < 5; ++i) {
    request.mutable_tokens()->add_ids((31 * story + 7 * number + 3 * i + 1) % kVocabulary);
  }
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(17 + story);
  request.set_ignore_end_of_text(true);
  request.set_max_tokens(options_.tokens_per_turn);
  Tokens tokens;
  absl::Status status;
  absl::Time last = absl::Now();
  int calls = 0;
  const auto ended = [&] {
    ++calls;
    const absl::Status before = status;
    status = client.Generate(request, [&](const v1::GenerateResponse& response) {
      const absl::Time now = absl::Now();
      if (now - last > longest_pause()) {
        NotePause(last, now, absl::StrCat(session, " turn ", number, " before token ", response.index()), calls,
                  before);
      }
      last = now;
      calls = 0;
      if (response.has_finish()) {
        if (is_first) *reused_tokens = response.finish().reused_tokens();
        return absl::OkStatus();
      }
      if (response.index() != tokens.size()) {
        return absl::InternalError(absl::StrCat("index ", response.index(), " came after ", tokens.size(), " tokens"));
      }
      tokens.push_back(response.token_id());
      return absl::OkStatus();
    });
    request.set_resume_from(tokens.size());
    return !MayPass(status);
  };
  (void)WaitUntil(ended, options_.limit);
  if (!status.ok()) return status;
  return tokens;
}

void Conversations::NotePause(absl::Time begin, absl::Time end, const std::string& of, int calls,
                              const absl::Status& why) {
  absl::MutexLock lock(&mu_);
  if (end - begin <= longest_pause_) return;
  longest_pause_ = end - begin;
  longest_pause_of_ = absl::StrCat(of, ", from ", absl::FormatTime("%H:%M:%E3S", begin, absl::UTCTimeZone()), " to ",
                                   absl::FormatTime("%H:%M:%E3S", end, absl::UTCTimeZone()), ", ", calls,
                                   " calls, the one before: ", why.ToString());
}

absl::Duration Conversations::longest_pause() const {
  absl::MutexLock lock(&mu_);
  return longest_pause_;
}

std::string Conversations::longest_pause_of() const {
  absl::MutexLock lock(&mu_);
  return longest_pause_of_;
}

void Conversations::Run(Conversation& conversation) {
  while (!stop_) {
    uint64_t reused_tokens = 0;
    absl::StatusOr<Tokens> tokens =
        Turn(*conversation.client, conversation.name, conversation.story, conversation.done, &reused_tokens);
    reused_tokens_ += reused_tokens;
    conversation.status = tokens.status();
    if (!tokens.ok()) {
      conversation.failed = true;
      return;
    }
    conversation.turns.push_back(*std::move(tokens));
    ++conversation.done;
  }
}

void Conversations::Start() {
  for (int i = 0; i < options_.count; ++i) {
    auto conversation = std::make_unique<Conversation>();
    conversation->name = absl::StrCat("s", i);
    conversation->story = i % options_.stories;
    conversation->client = make_client_(i);
    Conversation& its = *conversations_.emplace_back(std::move(conversation));
    its.thread = std::thread([this, &its] { Run(its); });
  }
  ExpectProgress();
}

void Conversations::ExpectProgress() {
  std::vector<int> before;
  for (const auto& conversation : conversations_) before.push_back(conversation->done);
  size_t further = 0;
  bool none_failed = true;
  const auto all_or_failed = [&] {
    none_failed = NoneFailed();
    further = 0;
    for (size_t i = 0; i < before.size(); ++i) further += conversations_[i]->done > before[i];
    return further == before.size() || !none_failed;
  };
  if (WaitUntil(all_or_failed, options_.limit) && none_failed) return;
  FAIL() << "only " << further << " of " << before.size() << " conversations get further";
}

bool Conversations::NoneFailed() {
  for (const auto& conversation : conversations_) {
    if (!conversation->failed) continue;
    ADD_FAILURE() << conversation->name << ", turn " << conversation->done << ": " << conversation->status;
    return false;
  }
  return true;
}

void Conversations::Stop() {
  stop_ = true;
  for (const auto& conversation : conversations_) {
    if (!conversation->thread.joinable()) continue;
    conversation->thread.join();
    EXPECT_TRUE(conversation->status.ok())
        << conversation->name << ", turn " << conversation->done << ": " << conversation->status;
  }
}

void Conversations::Compare() {
  Stop();
  std::vector<Story> stories(options_.stories);
  for (const auto& conversation : conversations_) {
    Story& story = stories[conversation->story];
    story.length = std::max(story.length, conversation->turns.size());
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < options_.stories; ++i) {
    threads.emplace_back([this, i, &story = stories[i]] { Tell(i, story); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Story& story : stories) ASSERT_TRUE(story.status.ok()) << story.status;
  for (const auto& conversation : conversations_) {
    for (size_t turn = 0; turn < conversation->turns.size(); ++turn) {
      const Tokens& undisturbed = stories[conversation->story].turns[turn];
      ASSERT_EQ(undisturbed.size(), static_cast<size_t>(options_.tokens_per_turn));
      ASSERT_EQ(conversation->turns[turn], undisturbed) << conversation->name << ", turn " << turn;
    }
  }
}

void Conversations::Tell(int number, Story& story) {
  const std::unique_ptr<router::RouterClient> client = make_client_(kTeller);
  uint64_t reused_tokens = 0;
  while (story.status.ok() && story.turns.size() < story.length) {
    absl::StatusOr<Tokens> tokens =
        Turn(*client, absl::StrCat("story-", number), number, static_cast<int>(story.turns.size()), &reused_tokens);
    story.status = tokens.status();
    if (tokens.ok()) story.turns.push_back(*std::move(tokens));
  }
}

int Conversations::turns() const {
  int turns = 0;
  for (const auto& conversation : conversations_) turns += conversation->done;
  return turns;
}

}  // namespace rwkv::testing
