#include "services/worker/client/fake_worker.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "services/worker/engine/own_steps.h"

namespace rwkv::worker {
namespace {

// Commands a stream may hold before Write is refused: a driver that never waits for its answers is broken.
constexpr size_t kMaxCommands = 4096;
// How long a router is taken to be there after it said so.
constexpr absl::Duration kRemembered = absl::Seconds(1);

uint64_t Mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

v1::StatusProto ToProto(const absl::Status& status) {
  v1::StatusProto proto;
  proto.set_code(static_cast<int>(status.code()));
  proto.set_message(std::string(status.message()));
  return proto;
}

}  // namespace

uint64_t FakeModel::Fresh(absl::string_view initial_state) {
  uint64_t state = 0x9e3779b97f4a7c15;
  for (const unsigned char byte : initial_state) state = Mix(state + byte);
  return state;
}

uint64_t FakeModel::Feed(uint64_t state, uint32_t token_id) { return Mix(state ^ Mix(token_id)); }

uint64_t FakeModel::Feed(uint64_t state, absl::Span<const uint32_t> token_ids) {
  for (uint32_t id : token_ids) state = Feed(state, id);
  return state;
}

uint32_t FakeModel::Next(uint64_t state, uint64_t position, const v1::Sampling& sampling, uint32_t vocab_size,
                         absl::Span<const uint32_t> banned, uint64_t counted) {
  uint64_t hash = Mix(state);
  if (sampling.frequency_penalty() != 0) hash = Mix(hash ^ counted);
  if (sampling.temperature() > 0) hash = Mix(hash ^ Mix(sampling.seed() + 1) ^ Mix(position + 2));
  uint32_t id = static_cast<uint32_t>(hash % vocab_size);
  const auto is_banned = [&banned](uint32_t candidate) {
    for (size_t i = 0; i + 1 < banned.size(); i += 2) {
      if (candidate >= banned[i] && candidate < banned[i + 1]) return true;
    }
    return false;
  };
  for (uint32_t tried = 0; tried < vocab_size && is_banned(id); ++tried) id = (id + 1) % vocab_size;
  return id;
}

std::vector<uint32_t> FakeModel::Generate(absl::Span<const uint32_t> log, int count, const v1::Sampling& sampling,
                                          uint32_t vocab_size, absl::string_view initial_state) {
  uint64_t state = Feed(Fresh(initial_state), log);
  uint64_t counted = sampling.penalize_prompt() ? Feed(0, log) : 0;
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) {
    tokens.push_back(Next(state, log.size() + i, sampling, vocab_size, {}, counted));
    state = Feed(state, tokens.back());
    counted = Feed(counted, tokens.back());
  }
  return tokens;
}

std::vector<uint32_t> FakeModel::Greedy(absl::Span<const uint32_t> log, int count, uint32_t vocab_size,
                                        absl::string_view initial_state) {
  return Generate(log, count, v1::Sampling(), vocab_size, initial_state);
}

// Everything behind one lock; no threads of its own: a command runs inside the call that makes it runnable.
class FakePipelineState : public std::enable_shared_from_this<FakePipelineState> {
 public:
  // One Execute stream, from Execute() until its owner drops it.
  struct Stream {
    int stage = 0;
    bool over = false;
    absl::Status end;
    std::string router;
    std::string epoch;  // Empty until open.
    bool opened = false;
    std::deque<v1::ExecuteRequest> commands;
    std::deque<v1::ExecuteResponse> responses;
    uint64_t steps_done = 0;
    uint64_t commands_taken = 0;
  };

  explicit FakePipelineState(FakePipeline::Options options)
      : options_(std::move(options)), initial_states_(options_.initial_states), fingerprint_(options_.fingerprint) {
    stages_.resize(options_.stage_count);
    for (Stage& stage : stages_) stage.slots.resize(options_.slots);
  }

  const FakePipeline::Options& options() const { return options_; }

  std::string Address(int index) const { return absl::StrCat(options_.name, "-", index, ":1"); }

  absl::StatusOr<v1::DescribeResponse> Describe(int index, const v1::DescribeRequest& request) {
    absl::MutexLock lock(&mu_);
    Stage& stage = stages_[index];
    if (stage.frozen) return absl::DeadlineExceededError(absl::StrCat("worker ", Address(index), ": no answer"));
    if (stage.dead) return absl::UnavailableError(absl::StrCat("worker ", Address(index), ": connection refused"));
    v1::DescribeResponse response;
    response.set_name(absl::StrCat(options_.name, "-", index));
    response.set_pid(1000 + index);
    v1::ModelInfo* model = response.mutable_model();
    model->set_name(options_.model_name);
    model->set_fingerprint(fingerprint_);
    model->set_version("7");
    model->set_layer_count(options_.layers);
    model->set_width(4);
    model->set_head_count(1);
    model->set_head_size(4);
    model->set_ffn_width(16);
    model->set_vocab_size(options_.vocab_size);
    model->set_dtype("fp32");
    model->set_tokenizer(options_.tokenizer);
    model->mutable_initial_states()->Add(initial_states_.begin(), initial_states_.end());
    response.set_first_layer(FirstLayer(index));
    response.set_end_layer(FirstLayer(index + 1));
    response.set_slots(options_.slots);
    response.set_max_batch_tokens(options_.max_batch_tokens);
    response.set_kernels("fake");
    response.set_numeric_family(options_.numeric_family);
    response.set_max_context_tokens(options_.max_context_tokens);
    v1::StateTensor* tensor = response.add_state_layout();
    tensor->set_name("att.state");
    tensor->add_shape(options_.record_bytes / static_cast<int64_t>(sizeof(float)));
    response.set_draining(stage.draining);
    if (stage.driver != nullptr) {
      response.set_driven_by(stage.driver->router);
      response.set_epoch(stage.driver->epoch);
    }
    const absl::Time now = absl::Now();
    if (request.has_router()) stage.routers[request.router().name()] = {request.router(), now};
    for (const auto& [name, router] : stage.routers) {
      if (now - router.second <= kRemembered) *response.add_routers() = router.first;
    }
    return response;
  }

  std::shared_ptr<Stream> Open(int stage) {
    auto stream = std::make_shared<Stream>();
    stream->stage = stage;
    return stream;
  }

  absl::Status Write(const std::shared_ptr<Stream>& stream, const v1::ExecuteRequest& request) {
    absl::MutexLock lock(&mu_);
    if (stream->over) return absl::UnavailableError("the stream is over");
    if (stages_[stream->stage].dead) {
      End(*stream, absl::UnavailableError(absl::StrCat("worker ", Address(stream->stage), ": connection refused")));
      return absl::UnavailableError("the stream is over");
    }
    if (stream->commands.size() >= kMaxCommands) {
      End(*stream, absl::ResourceExhaustedError("fake worker: commands are not waited for"));
      return absl::UnavailableError("the stream is over");
    }
    if (stream->epoch.empty()) {
      OpenEpoch(stream, request);
      return absl::OkStatus();
    }
    stream->commands.push_back(request);
    if (stream->stage == 0 && request.has_step()) {
      const int in_flight = static_cast<int>(request.step().step_id() - LastStepsDone(*stream));
      stats_.max_steps_in_flight = std::max(stats_.max_steps_in_flight, in_flight);
    }
    Advance();
    return absl::OkStatus();
  }

  absl::StatusOr<v1::ExecuteResponse> Read(const std::shared_ptr<Stream>& stream) {
    absl::MutexLock lock(&mu_);
    if (stages_[stream->stage].dead && !stream->over) {
      End(*stream, absl::UnavailableError(absl::StrCat("worker ", Address(stream->stage), ": connection refused")));
    }
    const auto ready = [&stream] { return stream->over || !stream->responses.empty(); };
    mu_.Await(absl::Condition(&ready));
    if (!stream->responses.empty()) {
      v1::ExecuteResponse response = std::move(stream->responses.front());
      stream->responses.pop_front();
      return response;
    }
    return stream->end;
  }

  void Cancel(const std::shared_ptr<Stream>& stream, const absl::Status& why) {
    absl::MutexLock lock(&mu_);
    EndEpochOf(stream, why);
  }

  void Kill(int index) {
    absl::MutexLock lock(&mu_);
    Stage& stage = stages_[index];
    stage.dead = true;
    const std::shared_ptr<Stream> driver = stage.driver;
    if (driver != nullptr) {
      EndEpochOf(driver, absl::UnavailableError(absl::StrCat("worker ", Address(index), ": connection reset")));
    }
    Clear(stage);
  }

  void Restart(int index) {
    absl::MutexLock lock(&mu_);
    stages_[index].dead = false;
    stages_[index].draining = false;
  }

  void BreakEpoch() {
    absl::MutexLock lock(&mu_);
    for (Stage& stage : stages_) {
      const std::shared_ptr<Stream> driver = stage.driver;
      if (driver != nullptr) EndEpochOf(driver, absl::UnavailableError("link: connection reset"));
    }
  }

  void SetDraining(int index, bool draining) {
    absl::MutexLock lock(&mu_);
    stages_[index].draining = draining;
  }

  void SetFrozen(int index, bool frozen) {
    absl::MutexLock lock(&mu_);
    stages_[index].frozen = frozen;
    Advance();
  }

  std::string driver(int index) {
    absl::MutexLock lock(&mu_);
    return stages_[index].driver == nullptr ? "" : stages_[index].driver->router;
  }

  void SetInitialStates(std::vector<std::string> initial_states) {
    absl::MutexLock lock(&mu_);
    initial_states_ = std::move(initial_states);
  }

  void SetFingerprint(std::string fingerprint) {
    absl::MutexLock lock(&mu_);
    fingerprint_ = std::move(fingerprint);
  }

  void FailBeyond(uint64_t position, absl::Status status) {
    absl::MutexLock lock(&mu_);
    fail_beyond_ = position;
    fail_beyond_with_ = std::move(status);
  }

  void HoldAttaches(bool held) {
    absl::MutexLock lock(&mu_);
    attaches_held_ = held;
    Advance();
  }

  void HoldSaves(bool held) {
    absl::MutexLock lock(&mu_);
    saves_held_ = held;
    Advance();
  }

  void SetSteps(bool paused, int allowed) {
    absl::MutexLock lock(&mu_);
    paused_ = paused;
    allowed_steps_ = allowed;
    Advance();
  }

  void AllowSteps(int count) {
    absl::MutexLock lock(&mu_);
    allowed_steps_ += count;
    Advance();
  }

  void FailAttaches(int count, absl::Status status) {
    absl::MutexLock lock(&mu_);
    failing_attaches_ = {count, std::move(status)};
  }
  void FailSaves(int count, absl::Status status) {
    absl::MutexLock lock(&mu_);
    failing_saves_ = {count, std::move(status)};
  }
  void FailEntries(int count, absl::Status status) {
    absl::MutexLock lock(&mu_);
    failing_entries_ = {count, std::move(status)};
  }

  void LoseSnapshot(const std::string& snapshot_id) {
    absl::MutexLock lock(&mu_);
    for (auto it = records_.begin(); it != records_.end();) {
      if (it->first.first == snapshot_id) {
        records_.erase(it++);
      } else {
        ++it;
      }
    }
    lost_snapshots_.push_back(snapshot_id);
  }

  FakePipeline::Stats stats() {
    absl::MutexLock lock(&mu_);
    FakePipeline::Stats stats = stats_;
    for (const Slot& slot : stages_[0].slots) stats.slots_used += slot.held;
    return stats;
  }

 private:
  struct Slot {
    bool held = false;
    uint64_t sequence = 0;
    uint64_t position = 0;
    uint64_t state = FakeModel::Fresh();
    v1::Sampling sampling;
    std::vector<uint32_t> banned;
    uint64_t counted = 0;  // Feed() of the tokens that the penalties count.
  };
  struct Stage {
    bool dead = false;
    bool draining = false;
    bool frozen = false;
    std::map<std::string, std::pair<v1::RouterAnnouncement, absl::Time>> routers;
    std::shared_ptr<Stream> driver;
    std::vector<Slot> slots;
    // Refusals of the running step that this stage hands on, by entry.
    absl::flat_hash_map<int, absl::Status> refusals;
  };
  struct Failing {
    int count = 0;
    absl::Status status;
    bool Take() { return count > 0 && count-- > 0; }
  };

  int FirstLayer(int stage) const { return options_.layers * stage / options_.stage_count; }
  bool IsLast(int stage) const { return stage + 1 == options_.stage_count; }

  void Clear(Stage& stage) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    own_steps_ = OwnSteps();
    stage.driver = nullptr;
    for (Slot& slot : stage.slots) slot = Slot();
    stage.refusals.clear();
  }

  static void End(Stream& stream, const absl::Status& why) {
    if (stream.over) return;
    stream.over = true;
    stream.end = why;
    stream.commands.clear();
  }

  // Ends `stream` with `why`, and the streams of the same epoch on other stages with kUnavailable.
  void EndEpochOf(std::shared_ptr<Stream> stream, const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const std::string epoch = stream->epoch;
    End(*stream, why);
    if (epoch.empty()) return;
    for (Stage& stage : stages_) {
      if (stage.driver == nullptr || stage.driver->epoch != epoch) continue;
      End(*stage.driver, absl::UnavailableError(absl::StrCat("link: epoch ", epoch, " ended: ", why.message())));
      Clear(stage);
    }
  }

  uint64_t LastStepsDone(const Stream& stream) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const std::shared_ptr<Stream>& last = stages_.back().driver;
    return last != nullptr && last->epoch == stream.epoch ? last->steps_done : 0;
  }

  void OpenEpoch(const std::shared_ptr<Stream>& stream, const v1::ExecuteRequest& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Stage& stage = stages_[stream->stage];
    if (!request.has_open() || request.open().epoch().empty()) {
      return End(*stream, absl::FailedPreconditionError("the first command is not `open`"));
    }
    const v1::OpenEpoch& open = request.open();
    if (open.stage_index() != stream->stage || open.stage_count() != options_.stage_count) {
      return End(*stream,
                 absl::FailedPreconditionError(absl::StrCat("stage ", open.stage_index(), " of ", open.stage_count(),
                                                            " does not fit layers ", FirstLayer(stream->stage))));
    }
    if (stage.draining) return End(*stream, absl::UnavailableError("the worker drains"));
    if (stage.driver != nullptr && stage.driver->router != open.router()) {
      return End(*stream, absl::UnavailableError(absl::StrCat("router ", stage.driver->router, " drives this worker")));
    }
    if (stage.driver != nullptr) {
      const std::shared_ptr<Stream> old = stage.driver;
      EndEpochOf(old, absl::UnavailableError("a newer stream of the same router took over"));
    }
    stream->router = open.router();
    stream->epoch = open.epoch();
    stage.driver = stream;
    Advance();
  }

  // Runs whatever can run, stage by stage, until nothing can.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (bool progress = true; progress;) {
      progress = false;
      for (int i = 0; i < options_.stage_count; ++i) {
        while (RunOne(i)) progress = true;
      }
      if (RunOwnStep()) progress = true;
    }
  }

  bool RunOne(int index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Stage& stage = stages_[index];
    if (stage.driver == nullptr || stage.frozen) return false;
    Stream& stream = *stage.driver;
    if (!stream.opened) {
      // The link to the next stage stands when that stage is in the epoch, too.
      if (!IsLast(index)) {
        const std::shared_ptr<Stream>& next = stages_[index + 1].driver;
        if (next == nullptr || next->epoch != stream.epoch) return false;
      }
      stream.opened = true;
      stream.responses.emplace_back().mutable_opened();
      if (IsLast(index)) ++stats_.epochs;
      return true;
    }
    if (stream.commands.empty()) return false;
    const v1::ExecuteRequest& head = stream.commands.front();
    if ((attaches_held_ && head.has_attach()) || (saves_held_ && head.has_save())) return false;
    if (head.has_step()) {
      if (index == 0 && paused_) {
        if (allowed_steps_ == 0) return false;
        --allowed_steps_;
      }
      if (index > 0) {
        const std::shared_ptr<Stream>& previous = stages_[index - 1].driver;
        // Refusals travel with the step, so the stage before may be only one step ahead; see below.
        if (previous == nullptr || previous->epoch != stream.epoch || previous->steps_done <= stream.steps_done) {
          return false;
        }
      }
      if (!IsLast(index)) {
        const std::shared_ptr<Stream>& next = stages_[index + 1].driver;
        if (next == nullptr || next->epoch != stream.epoch || next->steps_done < stream.steps_done) {
          if (index == 0 && paused_) ++allowed_steps_;
          return false;
        }
      }
    }
    const v1::ExecuteRequest command = std::move(stream.commands.front());
    stream.commands.pop_front();
    ++stream.commands_taken;
    switch (command.command_case()) {
      case v1::ExecuteRequest::kAttach:
        Attach(index, command.attach());
        break;
      case v1::ExecuteRequest::kStep:
        Step(index, command.step());
        break;
      case v1::ExecuteRequest::kSave:
        Save(index, command.save());
        break;
      case v1::ExecuteRequest::kRelease:
        if (index == 0) own_steps_.OnRelease(command.release());
        Release(index, command.release());
        break;
      case v1::ExecuteRequest::kGoOn:
        if (index == 0) SendStopped(own_steps_.OnGoOn(command.go_on()));
        break;
      case v1::ExecuteRequest::kOpen:
      case v1::ExecuteRequest::COMMAND_NOT_SET: {
        const std::shared_ptr<Stream> driver = stage.driver;
        EndEpochOf(driver, absl::InvalidArgumentError("a command that is not attach, step, save, release or go on"));
        return false;
      }
    }
    return true;
  }

  // Of sequences that decode by themselves; through all stages at once.
  bool RunOwnStep() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!own_steps_.ready() || (paused_ && allowed_steps_ == 0)) return false;
    const Stage& first = stages_[0];
    if (first.driver == nullptr) return false;
    for (const Stage& stage : stages_) {
      if (stage.driver == nullptr || stage.frozen || stage.driver->epoch != first.driver->epoch) return false;
      if (stage.driver->steps_done != first.driver->steps_done) return false;
      if (stage.driver->commands_taken < first.driver->commands_taken) return false;  // The first's order counts.
    }
    if (paused_) --allowed_steps_;
    const v1::Step step = own_steps_.Next(options_.max_batch_tokens, options_.stage_count);
    for (int index = 0; index < options_.stage_count; ++index) Step(index, step);
    ++stats_.own_steps;
    return true;
  }

  void SendStopped(const OwnSteps::Stopped& stopped) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const v1::SequenceStopped& one : stopped) {
      *stages_[0].driver->responses.emplace_back().mutable_stopped() = one;
    }
  }

  absl::Status CheckSlot(const Stage& stage, int slot, uint64_t sequence, uint64_t position) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (slot < 0 || slot >= options_.slots) {
      return absl::InvalidArgumentError(absl::StrCat("slot ", slot, " is outside the pool of ", options_.slots));
    }
    const Slot& held = stage.slots[slot];
    if (!held.held || held.sequence != sequence) {
      return absl::AbortedError(absl::StrCat("slot ", slot, " does not hold sequence ", sequence));
    }
    if (held.position != position) {
      return absl::AbortedError(
          absl::StrCat("slot ", slot, " is at position ", held.position, ", expected ", position));
    }
    return absl::OkStatus();
  }

  void Attach(int index, const v1::AttachSequence& attach) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Status status = failing_attaches_.Take() ? failing_attaches_.status : DoAttach(index, attach);
    if (status.ok() && index == 0) own_steps_.OnAttach(attach);
    v1::SequenceAttached* attached = stages_[index].driver->responses.emplace_back().mutable_attached();
    attached->set_slot(attach.slot());
    attached->set_sequence(attach.sequence());
    *attached->mutable_status() = ToProto(status);
  }

  absl::Status DoAttach(int index, const v1::AttachSequence& attach) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Stage& stage = stages_[index];
    if (attach.slot() < 0 || attach.slot() >= options_.slots) {
      return absl::InvalidArgumentError(
          absl::StrCat("slot ", attach.slot(), " is outside the pool of ", options_.slots));
    }
    Slot& slot = stage.slots[attach.slot()];
    Slot fresh;
    fresh.held = true;
    fresh.sequence = attach.sequence();
    fresh.position = attach.position();
    fresh.sampling = attach.sampling();
    fresh.counted =
        FakeModel::Feed(0, std::vector<uint32_t>(attach.turn_token_ids().begin(), attach.turn_token_ids().end()));
    fresh.banned.assign(attach.banned_token_ids().begin(), attach.banned_token_ids().end());
    switch (attach.source_case()) {
      case v1::AttachSequence::kFresh:
        if (attach.position() != 0) return absl::InvalidArgumentError("a fresh sequence is at position 0");
        if (!attach.initial_state().empty() &&
            std::count(initial_states_.begin(), initial_states_.end(), attach.initial_state()) == 0) {
          return absl::FailedPreconditionError(absl::StrCat("no tuned state ", attach.initial_state()));
        }
        fresh.state = FakeModel::Fresh(attach.initial_state());
        if (IsLast(index)) ++stats_.attaches_fresh;
        if (IsLast(index) && !attach.initial_state().empty()) ++stats_.attaches_tuned;
        break;
      case v1::AttachSequence::kWarmSequence:
        if (!slot.held || slot.sequence != attach.warm_sequence() || slot.position != attach.position()) {
          return absl::AbortedError(absl::StrCat("slot ", attach.slot(), " does not hold sequence ",
                                                 attach.warm_sequence(), " at ", attach.position()));
        }
        fresh.state = slot.state;
        if (IsLast(index)) ++stats_.attaches_warm;
        break;
      case v1::AttachSequence::kSnapshot: {
        slot = Slot();
        const v1::SnapshotManifest& manifest = attach.snapshot();
        if (manifest.model_fingerprint() != fingerprint_) {
          return absl::FailedPreconditionError("the snapshot belongs to another model");
        }
        if (manifest.position() != attach.position() || manifest.records_size() != options_.layers) {
          return absl::DataLossError(absl::StrCat("snapshot ", manifest.snapshot_id(), ": manifest does not fit"));
        }
        for (int layer = FirstLayer(index); layer < FirstLayer(index + 1); ++layer) {
          const absl::StatusOr<std::string> bytes = GetRecord(manifest.records(layer));
          if (!bytes.ok()) return bytes.status();
          if (bytes->size() != static_cast<size_t>(options_.record_bytes)) {
            return absl::DataLossError("record of a wrong size");
          }
          std::memcpy(&fresh.state, bytes->data(), sizeof(fresh.state));
        }
        if (IsLast(index)) ++stats_.attaches_snapshot;
        break;
      }
      case v1::AttachSequence::SOURCE_NOT_SET:
        return absl::InvalidArgumentError("no source");
    }
    slot = std::move(fresh);
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> GetRecord(const v1::RecordInfo& info) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (std::find(lost_snapshots_.begin(), lost_snapshots_.end(), info.snapshot_id()) != lost_snapshots_.end()) {
      return absl::DataLossError(absl::StrCat("snapshot ", info.snapshot_id(), " layer ", info.layer(), " is gone"));
    }
    if (options_.get_record) return options_.get_record(info);
    const auto it = records_.find({info.snapshot_id(), info.layer()});
    if (it == records_.end()) {
      return absl::DataLossError(absl::StrCat("snapshot ", info.snapshot_id(), " layer ", info.layer(), " is gone"));
    }
    return it->second;
  }

  absl::Status RunEntry(Stage& stage, const v1::StepEntry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Status status = CheckSlot(stage, entry.slot(), entry.sequence(), entry.expected_position());
    if (!status.ok()) return status;
    if (entry.token_ids_size() == 0) return absl::InvalidArgumentError("an entry without tokens");
    if (entry.score_token_ids_size() > entry.token_ids_size()) return absl::InvalidArgumentError("too many scores");
    for (uint32_t id : entry.token_ids()) {
      if (id >= static_cast<uint32_t>(options_.vocab_size)) {
        return absl::InvalidArgumentError(absl::StrCat("token id ", id, " is not below ", options_.vocab_size));
      }
    }
    Slot& slot = stage.slots[entry.slot()];
    if (options_.max_context_tokens != 0 && slot.position + entry.token_ids_size() > options_.max_context_tokens) {
      return absl::FailedPreconditionError(absl::StrCat("slot ", entry.slot(), ": pass the model's context of ",
                                                        options_.max_context_tokens, " tokens"));
    }
    for (uint32_t id : entry.token_ids()) slot.state = FakeModel::Feed(slot.state, id);
    slot.position += entry.token_ids_size();
    return absl::OkStatus();
  }

  // Without an id: an own one.
  void Step(int index, const v1::Step& step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Stage& stage = stages_[index];
    Stream& stream = *stage.driver;
    int rows = 0;
    for (const v1::StepEntry& entry : step.entries()) rows += entry.token_ids_size();
    const bool is_own = step.step_id() == 0;
    if ((!is_own && step.step_id() != stream.steps_done + 1) || rows > options_.max_batch_tokens ||
        step.entries_size() == 0) {
      const std::shared_ptr<Stream> driver = stage.driver;
      return EndEpochOf(driver, absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), " with ", rows,
                                                                        " rows after step ", stream.steps_done)));
    }
    if (!is_own) ++stream.steps_done;
    if (index == 0) own_steps_.OnStep(step);
    absl::flat_hash_map<int, absl::Status> refusals;
    if (index > 0) refusals = std::move(stages_[index - 1].refusals);
    v1::StepResult result;
    result.set_step_id(step.step_id());
    for (int i = 0; i < step.entries_size(); ++i) {
      const v1::StepEntry& entry = step.entries(i);
      v1::EntryResult* out = result.add_entries();
      out->set_slot(entry.slot());
      out->set_sequence(entry.sequence());
      if (!refusals.contains(i)) {
        absl::Status status = index == 0 && failing_entries_.Take() ? failing_entries_.status : RunEntry(stage, entry);
        if (!status.ok()) refusals[i] = std::move(status);
      }
      const bool in_pool = entry.slot() >= 0 && entry.slot() < options_.slots;
      if (in_pool) out->set_position(stage.slots[entry.slot()].position);
      const auto refused = refusals.find(i);
      *out->mutable_status() = ToProto(refused == refusals.end() ? absl::OkStatus() : refused->second);
      if (refused != refusals.end() || !IsLast(index)) continue;
      Slot& slot = stage.slots[entry.slot()];
      const bool asks = entry.logits() || entry.sample() || entry.score_token_ids_size() > 0;
      if (asks && !fail_beyond_with_.ok() && slot.position > fail_beyond_) {
        *out->mutable_status() = ToProto(fail_beyond_with_);
        continue;
      }
      if (entry.logits()) {
        // Not a distribution, but the same for the same state: row t holds the low bits of the hash after token t.
        v1::LogitsRows* logits = stream.responses.emplace_back().mutable_logits();
        logits->set_step_id(step.step_id());
        logits->set_sequence(entry.sequence());
        logits->set_first_position(entry.expected_position());
        logits->set_rows(entry.token_ids_size());
        std::vector<float> row(options_.vocab_size, 0.0f);
        std::string bytes;
        for (int t = 0; t < entry.token_ids_size(); ++t) {
          row[0] = static_cast<float>(entry.expected_position() + t);
          row[entry.token_ids(t)] += 1.0f;
          bytes.append(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(float));
          row[entry.token_ids(t)] -= 1.0f;
        }
        logits->set_logits(bytes);
      }
      for (uint32_t id : entry.score_token_ids()) out->add_scores(-static_cast<float>(id % 97) / 8.0f);
      if (entry.sample()) {
        out->set_token_id(
            FakeModel::Next(slot.state, slot.position, slot.sampling, options_.vocab_size, slot.banned, slot.counted));
        slot.counted = FakeModel::Feed(slot.counted, out->token_id());
        out->set_logprob(-static_cast<float>(out->token_id() % 97) / 8.0f);
        for (uint32_t n = 0; n < slot.sampling.top_logprobs(); ++n) {
          v1::TokenLogprob* top = out->add_top_logprobs();
          top->set_token_id((out->token_id() + n) % options_.vocab_size);
          top->set_logprob(-static_cast<float>(n) - 0.5f);
        }
      }
    }
    if (!IsLast(index)) {
      stage.refusals = std::move(refusals);
      return;
    }
    ++stats_.steps;
    stats_.rows += rows;
    stats_.entries += step.entries_size();
    stats_.refused_entries += refusals.size();
    stats_.max_rows_in_step = std::max(stats_.max_rows_in_step, rows);
    stats_.max_entries_in_step = std::max(stats_.max_entries_in_step, step.entries_size());
    *stream.responses.emplace_back().mutable_step() = result;
    SendStopped(own_steps_.OnResult(result));
  }

  void Save(int index, const v1::SaveSnapshot& save) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Stage& stage = stages_[index];
    v1::SnapshotSaved saved;
    saved.set_snapshot_id(save.snapshot_id());
    absl::Status status = CheckSlot(stage, save.slot(), save.sequence(), save.expected_position());
    if (status.ok() && failing_saves_.Take()) status = failing_saves_.status;
    for (int layer = FirstLayer(index); status.ok() && layer < FirstLayer(index + 1); ++layer) {
      const uint64_t state = stage.slots[save.slot()].state;
      std::string bytes;
      for (uint64_t word = state; bytes.size() < static_cast<size_t>(options_.record_bytes); ++word) {
        bytes.append(reinterpret_cast<const char*>(&word), sizeof(word));
      }
      v1::RecordInfo info;
      info.set_snapshot_id(save.snapshot_id());
      info.set_layer(layer);
      info.set_bytes(bytes.size());
      info.set_crc32c(Crc32c(bytes));
      if (options_.put_record) {
        status = options_.put_record(info, bytes);
      } else {
        records_[{save.snapshot_id(), layer}] = bytes;
      }
      *saved.add_records() = info;
    }
    if (!status.ok()) saved.clear_records();
    if (status.ok() && IsLast(index)) ++stats_.saves;
    *saved.mutable_status() = ToProto(status);
    *stage.driver->responses.emplace_back().mutable_saved() = std::move(saved);
  }

  void Release(int index, const v1::ReleaseSlot& release) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Stage& stage = stages_[index];
    if (release.slot() < 0 || release.slot() >= options_.slots) return;
    Slot& slot = stage.slots[release.slot()];
    if (!slot.held || slot.sequence != release.sequence()) return;
    slot = Slot();
    if (IsLast(index)) ++stats_.releases;
  }

  // Castagnoli, bit by bit: a plain twin of the real one, for a few bytes.
  static uint32_t Crc32c(const std::string& bytes) {
    uint32_t crc = 0xffffffff;
    for (const unsigned char byte : bytes) {
      crc ^= byte;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
    }
    return crc ^ 0xffffffff;
  }

  const FakePipeline::Options options_;
  mutable absl::Mutex mu_;
  std::vector<std::string> initial_states_ ABSL_GUARDED_BY(mu_);
  std::string fingerprint_ ABSL_GUARDED_BY(mu_);
  uint64_t fail_beyond_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status fail_beyond_with_ ABSL_GUARDED_BY(mu_);
  bool attaches_held_ ABSL_GUARDED_BY(mu_) = false;
  bool saves_held_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<Stage> stages_ ABSL_GUARDED_BY(mu_);
  OwnSteps own_steps_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::pair<std::string, int>, std::string> records_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> lost_snapshots_ ABSL_GUARDED_BY(mu_);
  bool paused_ ABSL_GUARDED_BY(mu_) = false;
  int allowed_steps_ ABSL_GUARDED_BY(mu_) = 0;
  Failing failing_attaches_ ABSL_GUARDED_BY(mu_);
  Failing failing_saves_ ABSL_GUARDED_BY(mu_);
  Failing failing_entries_ ABSL_GUARDED_BY(mu_);
  FakePipeline::Stats stats_ ABSL_GUARDED_BY(mu_);
};

namespace {

class FakeStream final : public ExecuteStream {
 public:
  FakeStream(std::shared_ptr<FakePipelineState> state, int stage)
      : state_(std::move(state)), stream_(state_->Open(stage)) {}
  ~FakeStream() override { Cancel(); }
  absl::Status Write(const v1::ExecuteRequest& request) override { return state_->Write(stream_, request); }
  absl::StatusOr<v1::ExecuteResponse> Read() override { return state_->Read(stream_); }
  void Cancel() override { state_->Cancel(stream_, absl::CancelledError("cancelled by the caller")); }

 private:
  const std::shared_ptr<FakePipelineState> state_;
  const std::shared_ptr<FakePipelineState::Stream> stream_;
};

class FakeWorkerClient final : public WorkerClient {
 public:
  FakeWorkerClient(std::shared_ptr<FakePipelineState> state, int stage) : state_(std::move(state)), stage_(stage) {}
  absl::StatusOr<v1::DescribeResponse> Describe(absl::Time deadline) override { return state_->Describe(stage_, {}); }
  void AskToDescribe(const v1::DescribeRequest& request, absl::Time deadline, Described done) override {
    done(state_->Describe(stage_, request));
  }
  std::unique_ptr<ExecuteStream> Execute() override { return std::make_unique<FakeStream>(state_, stage_); }
  std::string address() const override { return state_->Address(stage_); }

 private:
  const std::shared_ptr<FakePipelineState> state_;
  const int stage_;
};

}  // namespace

FakePipeline::FakePipeline(Options options) : state_(std::make_shared<FakePipelineState>(std::move(options))) {}
FakePipeline::~FakePipeline() { state_->BreakEpoch(); }
std::unique_ptr<WorkerClient> FakePipeline::Connect(int stage) {
  return std::make_unique<FakeWorkerClient>(state_, stage);
}
void FakePipeline::Kill(int stage) { state_->Kill(stage); }
void FakePipeline::Restart(int stage) { state_->Restart(stage); }
void FakePipeline::BreakEpoch() { state_->BreakEpoch(); }
void FakePipeline::SetDraining(int stage, bool draining) { state_->SetDraining(stage, draining); }
void FakePipeline::Freeze(int stage) { state_->SetFrozen(stage, true); }
void FakePipeline::Thaw(int stage) { state_->SetFrozen(stage, false); }
std::string FakePipeline::driver(int stage) const { return state_->driver(stage); }
void FakePipeline::SetInitialStates(std::vector<std::string> initial_states) {
  state_->SetInitialStates(std::move(initial_states));
}
void FakePipeline::SetFingerprint(std::string fingerprint) { state_->SetFingerprint(std::move(fingerprint)); }
void FakePipeline::FailBeyond(uint64_t position, absl::Status status) {
  state_->FailBeyond(position, std::move(status));
}
void FakePipeline::HoldAttaches(bool held) { state_->HoldAttaches(held); }
void FakePipeline::HoldSaves(bool held) { state_->HoldSaves(held); }
void FakePipeline::PauseSteps() { state_->SetSteps(true, 0); }
void FakePipeline::ResumeSteps() { state_->SetSteps(false, 0); }
void FakePipeline::AllowSteps(int count) { state_->AllowSteps(count); }
void FakePipeline::FailAttaches(int count, absl::Status status) { state_->FailAttaches(count, std::move(status)); }
void FakePipeline::FailSaves(int count, absl::Status status) { state_->FailSaves(count, std::move(status)); }
void FakePipeline::FailEntries(int count, absl::Status status) { state_->FailEntries(count, std::move(status)); }
void FakePipeline::LoseSnapshot(const std::string& snapshot_id) { state_->LoseSnapshot(snapshot_id); }
FakePipeline::Stats FakePipeline::stats() const { return state_->stats(); }

}  // namespace rwkv::worker
