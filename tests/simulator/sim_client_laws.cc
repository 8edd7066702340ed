// What a client holds the cluster to: every message, and the log of its session.
#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "services/common/grpc_status.h"
#include "services/worker/client/fake_worker.h"
#include "tests/simulator/world.h"

namespace rwkv::simulator {
namespace {

// Faults come until 12 s and last up to 9 s: 21 s in which nothing may work. Then it takes at most 3 s until the client
// sees that its call is lost, 3 s until a lease runs out, 3 s until a call to the store is given up, and 20 s in the line
// (max_wait).
constexpr absl::Duration kLongestPause = absl::Seconds(21 + 3 + 3 + 3 + 20);

}  // namespace

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

}  // namespace rwkv::simulator
