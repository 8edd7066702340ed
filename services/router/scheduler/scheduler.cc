#include "services/router/scheduler/scheduler.h"

#include <algorithm>
#include <deque>
#include <map>
#include <utility>

namespace rwkv::router {
namespace {

// A prompt is not cut finer than this to fill the stages: below it a step costs about the same whatever its rows.
constexpr int64_t kMinChunkRows = 32;
// The share of a step's rows that decode leaves to prefill.
constexpr int kPrefillShare = 8;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Scheduler::Scheduler(const Options& options) : options_(options) {
  for (int slot = options_.slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

bool Scheduler::CanAdmit(SequenceId id) const {
  return static_cast<int>(sequences_.size()) < options_.max_sequences && !sequences_.contains(id);
}

void Scheduler::Count(SequenceId id, const Sequence& sequence, int by) {
  rows_waiting_ += by * sequence.pending;
  decoding_ += by * (sequence.is_decoding() ? 1 : 0);
  if (!sequence.has_work()) return;
  if (!sequence.decoding) prefill_rows_ += by * sequence.pending;
  absl::btree_set<SequenceId>& ready = sequence.decoding ? decode_ready_ : prefill_ready_;
  if (by > 0) {
    ready.insert(id);
  } else {
    ready.erase(id);
  }
}

template <typename Edit>
void Scheduler::Change(SequenceId id, Sequence& sequence, Edit edit) {
  const bool had_work = sequence.has_work();
  Count(id, sequence, -1);
  edit();
  Count(id, sequence, 1);
  if (!had_work && sequence.has_work()) shares_.Begin(sequence.tenant, sequence.weight);
  if (had_work && !sequence.has_work()) shares_.End(sequence.tenant);
}

bool Scheduler::Admit(SequenceId id, uint64_t position, absl::string_view tenant, double weight) {
  if (!CanAdmit(id)) return false;
  Sequence& sequence = sequences_[id];
  sequence.tenant = std::string(tenant);
  sequence.weight = weight;
  sequence.position = position;
  sequence.order = ++counter_;
  waiting_.push_back(id);
  return true;
}

absl::optional<Scheduler::WarmSlot> Scheduler::FindWarm(absl::string_view session_id, absl::string_view log_branch,
                                                        uint64_t max_position) const {
  absl::optional<WarmSlot> best;
  for (const auto& [sequence, warm] : warm_) {
    if (warm.session_id != session_id || warm.log_branch != log_branch || warm.position > max_position) continue;
    if (!best.has_value() || warm.position >= best->position) best = WarmSlot{sequence, warm.position};
  }
  return best;
}

bool Scheduler::AdmitWarm(SequenceId id, SequenceId warm, absl::string_view tenant, double weight) {
  const auto it = warm_.find(warm);
  if (it == warm_.end() || !CanAdmit(id)) return false;
  Sequence& sequence = sequences_[id];
  sequence.tenant = std::string(tenant);
  sequence.weight = weight;
  sequence.slot = it->second.slot;
  sequence.position = it->second.position;
  sequence.order = ++counter_;
  warm_.erase(it);
  AttachCommand attach;
  attach.slot = sequence.slot;
  attach.sequence = id;
  attach.position = sequence.position;
  attach.warm_sequence = warm;
  commands_.push_back(std::move(attach));
  return true;
}

void Scheduler::OnAttached(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end() || it->second.slot < 0) return;
  Change(id, it->second, [&] { it->second.attached = true; });
}

void Scheduler::Feed(SequenceId id, int64_t tokens, FeedKind kind) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end() || tokens < 1) return;
  Sequence& sequence = it->second;
  Change(id, sequence, [&] {
    sequence.decoding = kind == FeedKind::kDecode;
    sequence.pending += tokens;
  });
  sequence.chunk = std::max(kMinChunkRows, CeilDiv(sequence.pending, max_steps_in_flight()));
  sequence.ready = ++counter_;
}

void Scheduler::Unfeed(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it != sequences_.end()) Change(id, it->second, [&] { it->second.pending = 0; });
}

void Scheduler::GoOn(SequenceId id, uint64_t until) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end() || !it->second.attached) return;
  it->second.position = until;
  commands_.push_back(GoOnCommand{it->second.slot, id, until});
}

void Scheduler::Halt(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it != sequences_.end() && it->second.attached) commands_.push_back(GoOnCommand{it->second.slot, id, 0});
}

void Scheduler::MoveTo(SequenceId id, uint64_t position) {
  const auto it = sequences_.find(id);
  if (it != sequences_.end()) it->second.position = position;
}

absl::optional<uint64_t> Scheduler::Save(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end() || !it->second.attached) return absl::nullopt;
  const Sequence& sequence = it->second;
  commands_.push_back(SaveCommand{sequence.slot, id, sequence.position});
  return sequence.position;
}

absl::optional<uint64_t> Scheduler::Retire(SequenceId id, absl::string_view session_id, absl::string_view log_branch) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end() || !it->second.attached) {
    Cancel(id);
    return absl::nullopt;
  }
  Warm& warm = warm_[id];
  warm.slot = it->second.slot;
  warm.position = it->second.position;
  warm.session_id = std::string(session_id);
  warm.log_branch = std::string(log_branch);
  warm.last_used = ++counter_;
  Erase(id);
  return warm.position;
}

void Scheduler::Cancel(SequenceId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  if (it->second.slot < 0) {
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), id));
  } else {
    commands_.push_back(ReleaseCommand{it->second.slot, id});
    free_slots_.push_back(it->second.slot);
  }
  Erase(id);
}

void Scheduler::Erase(SequenceId id) {
  Unfeed(id);
  const auto it = sequences_.find(id);
  Count(id, it->second, -1);
  sequences_.erase(it);
}

void Scheduler::EvictWarm(SequenceId warm) {
  const auto it = warm_.find(warm);
  commands_.push_back(ReleaseCommand{it->second.slot, warm});
  free_slots_.push_back(it->second.slot);
  warm_.erase(it);
}

void Scheduler::DropWarm(absl::string_view session_id) {
  std::vector<SequenceId> dropped;
  for (const auto& [sequence, warm] : warm_) {
    if (warm.session_id == session_id) dropped.push_back(sequence);
  }
  for (SequenceId sequence : dropped) EvictWarm(sequence);
}

void Scheduler::OnStepDone(uint64_t step_id) { in_flight_.erase(step_id); }

std::vector<Command> Scheduler::Plan() {
  AssignSlots();
  while (steps_in_flight() < max_steps_in_flight() && StartStep()) {
  }
  return std::exchange(commands_, {});
}

void Scheduler::AssignSlots() {
  while (!waiting_.empty()) {
    if (free_slots_.empty()) {
      const auto oldest = std::min_element(warm_.begin(), warm_.end(), [](const auto& a, const auto& b) {
        return a.second.last_used < b.second.last_used;
      });
      if (oldest == warm_.end()) return;
      EvictWarm(oldest->first);
    }
    const SequenceId id = waiting_.front();
    waiting_.pop_front();
    Sequence& sequence = sequences_.at(id);
    sequence.slot = free_slots_.back();
    free_slots_.pop_back();
    AttachCommand attach;
    attach.slot = sequence.slot;
    attach.sequence = id;
    attach.position = sequence.position;
    commands_.push_back(std::move(attach));
  }
}

bool Scheduler::StartStep() {
  if (decode_ready_.empty() && prefill_ready_.empty()) return false;

  StepCommand step;
  step.step_id = next_step_;
  int decode_limit = static_cast<int>(CeilDiv(decoding_, max_steps_in_flight()));
  int reserved = 0;
  if (!prefill_ready_.empty() && !decode_ready_.empty()) {
    if (options_.max_batch_rows == 1) {
      reserved = static_cast<int>(next_step_ % 2);
    } else {
      reserved =
          static_cast<int>(std::min<int64_t>(prefill_rows_, std::max(1, options_.max_batch_rows / kPrefillShare)));
    }
  }
  decode_limit = std::min(decode_limit, options_.max_batch_rows - reserved);
  TakeDecode(decode_limit, &step);
  TakePrefill(options_.max_batch_rows - static_cast<int>(step.entries.size()), &step);
  ++next_step_;
  in_flight_.insert(step.step_id);
  commands_.push_back(std::move(step));
  return true;
}

void Scheduler::AddEntry(SequenceId id, Sequence& sequence, int tokens, StepCommand* step) {
  StepCommand::Entry entry;
  entry.slot = sequence.slot;
  entry.sequence = id;
  entry.position = sequence.position;
  entry.tokens = tokens;
  sequence.position += tokens;
  shares_.Charge(sequence.tenant, tokens);
  Change(id, sequence, [&] { sequence.pending -= tokens; });
  entry.last = sequence.pending == 0;
  step->entries.push_back(entry);
}

namespace {

// Sequences of each tenant, in the order in which they are to be served.
template <typename Key>
class Lines {
 public:
  void Add(const std::string& tenant, Key key, SequenceId id) { lines_[tenant].emplace_back(key, id); }
  void Sort() {
    for (auto& [tenant, line] : lines_) std::sort(line.begin(), line.end());
  }
  // Takes the first of the tenant that is next, of equal ones of that whose first comes first. Unset: none is left.
  absl::optional<SequenceId> Next(const FairShare& shares) {
    auto next = lines_.begin();
    for (auto line = lines_.begin(); line != lines_.end(); ++line) {
      if (Place(shares, *line) < Place(shares, *next)) next = line;
    }
    if (next == lines_.end()) return absl::nullopt;
    const SequenceId id = next->second.front().second;
    next->second.pop_front();
    if (next->second.empty()) lines_.erase(next);
    return id;
  }

 private:
  using Line = std::deque<std::pair<Key, SequenceId>>;
  static std::pair<double, std::pair<Key, SequenceId>> Place(const FairShare& shares,
                                                             const std::pair<const std::string, Line>& line) {
    return {shares.counter(line.first), line.second.front()};
  }
  std::map<std::string, Line> lines_;
};

}  // namespace

void Scheduler::TakeDecode(int max_entries, StepCommand* step) {
  Lines<uint64_t> ready;  // Longest waiting first.
  for (const SequenceId id : decode_ready_) {
    const Sequence& sequence = sequences_.at(id);
    ready.Add(sequence.tenant, sequence.ready, id);
  }
  ready.Sort();
  while (static_cast<int>(step->entries.size()) < max_entries) {
    const absl::optional<SequenceId> id = ready.Next(shares_);
    if (!id.has_value()) return;
    AddEntry(*id, sequences_.at(*id), 1, step);
  }
}

void Scheduler::TakePrefill(int rows, StepCommand* step) {
  // (tokens left in steps that favour short prompts, admitted) -> sequence
  Lines<std::pair<int64_t, uint64_t>> ready;
  const bool shortest_first = step->step_id % 2 == 0;
  for (const SequenceId id : prefill_ready_) {
    const Sequence& sequence = sequences_.at(id);
    ready.Add(sequence.tenant, {shortest_first ? sequence.pending : 0, sequence.order}, id);
  }
  ready.Sort();
  while (rows > 0) {
    const absl::optional<SequenceId> id = ready.Next(shares_);
    if (!id.has_value()) return;
    Sequence& sequence = sequences_.at(*id);
    const int tokens = static_cast<int>(std::min<int64_t>({sequence.pending, sequence.chunk, rows}));
    AddEntry(*id, sequence, tokens, step);
    rows -= tokens;
  }
}

int Scheduler::slots_in_use() const {
  return options_.slots - static_cast<int>(free_slots_.size()) - static_cast<int>(warm_.size());
}

}  // namespace rwkv::router
