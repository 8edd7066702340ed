#include "services/worker/client/fake_pipeline.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace rwkv::worker {
namespace {

// Commands a stream may hold before Write is refused: a driver that never waits for its answers is broken.
constexpr size_t kMaxCommands = 4096;
// How long a router is taken to be there after it said so.
constexpr absl::Duration kRemembered = absl::Seconds(1);

}  // namespace

FakePipelineState::FakePipelineState(FakePipeline::Options options)
    : options_(std::move(options)), records_(options_.put_record, options_.get_record) {
  conditions_.initial_states = options_.initial_states;
  conditions_.fingerprint = options_.fingerprint;
  for (int i = 0; i < options_.stage_count; ++i) {
    workers_.push_back({false, false, false, {}, nullptr, FakeStage(i, &options_, &conditions_, &records_, &stats_)});
  }
}

std::string FakePipelineState::Address(int index) const { return absl::StrCat(options_.name, "-", index, ":1"); }

absl::Status FakePipelineState::Refused(int index) const {
  return absl::UnavailableError(absl::StrCat("worker ", Address(index), ": connection refused"));
}

absl::StatusOr<v1::DescribeResponse> FakePipelineState::Describe(int index, const v1::DescribeRequest& request) {
  absl::MutexLock lock(&mu_);
  Worker& worker = workers_[index];
  if (worker.frozen) return absl::DeadlineExceededError(absl::StrCat("worker ", Address(index), ": no answer"));
  if (worker.dead) return Refused(index);
  v1::DescribeResponse response;
  response.set_name(absl::StrCat(options_.name, "-", index));
  response.set_pid(1000 + index);
  v1::ModelInfo* model = response.mutable_model();
  model->set_name(options_.model_name);
  model->set_fingerprint(conditions_.fingerprint);
  model->set_version("7");
  model->set_layer_count(options_.layers);
  model->set_width(4);
  model->set_head_count(1);
  model->set_head_size(4);
  model->set_ffn_width(16);
  model->set_vocab_size(options_.vocab_size);
  model->set_dtype("fp32");
  model->set_tokenizer(options_.tokenizer);
  model->mutable_initial_states()->Add(conditions_.initial_states.begin(), conditions_.initial_states.end());
  response.set_first_layer(worker.stage.first_layer());
  response.set_end_layer(worker.stage.end_layer());
  response.set_slots(options_.slots);
  response.set_max_batch_tokens(options_.max_batch_tokens);
  response.set_kernels("fake");
  response.set_numeric_family(options_.numeric_family);
  response.set_max_context_tokens(options_.max_context_tokens);
  v1::StateTensor* tensor = response.add_state_layout();
  tensor->set_name("att.state");
  tensor->add_shape(options_.record_bytes / static_cast<int64_t>(sizeof(float)));
  response.set_draining(worker.draining);
  if (worker.driver != nullptr) {
    response.set_driven_by(worker.driver->router);
    response.set_epoch(worker.driver->epoch);
  }
  const absl::Time now = absl::Now();
  if (request.has_router()) worker.routers[request.router().name()] = {request.router(), now};
  for (const auto& [name, router] : worker.routers) {
    if (now - router.second <= kRemembered) *response.add_routers() = router.first;
  }
  return response;
}

std::string FakePipelineState::Driver(int index) {
  absl::MutexLock lock(&mu_);
  return workers_[index].driver == nullptr ? "" : workers_[index].driver->router;
}

FakePipeline::Stats FakePipelineState::stats() {
  absl::MutexLock lock(&mu_);
  FakePipeline::Stats stats = stats_;
  stats.slots_used = workers_[0].stage.slots_used();
  return stats;
}

std::shared_ptr<FakePipelineState::Stream> FakePipelineState::Open(int stage) {
  auto stream = std::make_shared<Stream>();
  stream->stage = stage;
  return stream;
}

absl::Status FakePipelineState::Write(const std::shared_ptr<Stream>& stream, const v1::ExecuteRequest& request) {
  absl::MutexLock lock(&mu_);
  if (!stream->over && workers_[stream->stage].dead) End(*stream, Refused(stream->stage));
  if (!stream->over && stream->commands.size() >= kMaxCommands) {
    End(*stream, absl::ResourceExhaustedError("fake worker: commands are not waited for"));
  }
  if (stream->over) return absl::UnavailableError("the stream is over");
  if (stream->epoch.empty()) {
    OpenEpoch(stream, request);
    return absl::OkStatus();
  }
  stream->commands.push_back(request);
  if (stream->stage == 0 && request.has_step()) {
    const int last = options_.stage_count - 1;
    const uint64_t done = IsInEpochOf(last, *stream) ? workers_[last].driver->steps_done : 0;
    stats_.max_steps_in_flight =
        std::max(stats_.max_steps_in_flight, static_cast<int>(request.step().step_id() - done));
  }
  Advance();
  return absl::OkStatus();
}

absl::StatusOr<v1::ExecuteResponse> FakePipelineState::Read(const std::shared_ptr<Stream>& stream) {
  absl::MutexLock lock(&mu_);
  if (workers_[stream->stage].dead) End(*stream, Refused(stream->stage));
  const auto ready = [&stream] { return stream->over || !stream->responses.empty(); };
  mu_.Await(absl::Condition(&ready));
  if (stream->responses.empty()) return stream->end;
  v1::ExecuteResponse response = std::move(stream->responses.front());
  stream->responses.pop_front();
  return response;
}

void FakePipelineState::Cancel(const std::shared_ptr<Stream>& stream, const absl::Status& why) {
  absl::MutexLock lock(&mu_);
  EndEpochOf(stream, why);
}

void FakePipelineState::Kill(int index) {
  absl::MutexLock lock(&mu_);
  Worker& worker = workers_[index];
  worker.dead = true;
  if (worker.driver != nullptr) {
    EndEpochOf(worker.driver, absl::UnavailableError(absl::StrCat("worker ", Address(index), ": connection reset")));
  }
  Clear(worker);
}

void FakePipelineState::Restart(int index) {
  absl::MutexLock lock(&mu_);
  workers_[index].dead = false;
  workers_[index].draining = false;
}

void FakePipelineState::BreakEpoch() {
  absl::MutexLock lock(&mu_);
  for (Worker& worker : workers_) {
    if (worker.driver != nullptr) EndEpochOf(worker.driver, absl::UnavailableError("link: connection reset"));
  }
}

void FakePipelineState::SetDraining(int index, bool draining) {
  absl::MutexLock lock(&mu_);
  workers_[index].draining = draining;
}

void FakePipelineState::SetFrozen(int index, bool frozen) {
  absl::MutexLock lock(&mu_);
  workers_[index].frozen = frozen;
  Advance();
}

void FakePipelineState::Change(const std::function<void(FakeConditions&)>& change) {
  absl::MutexLock lock(&mu_);
  change(conditions_);
  Advance();
}

void FakePipelineState::LoseSnapshot(const std::string& snapshot_id) {
  absl::MutexLock lock(&mu_);
  records_.Lose(snapshot_id);
}

bool FakePipelineState::IsInEpochOf(int index, const Stream& stream) const {
  const std::shared_ptr<Stream>& driver = workers_[index].driver;
  return driver != nullptr && driver->epoch == stream.epoch;
}

void FakePipelineState::Clear(Worker& worker) {
  own_steps_ = OwnSteps();
  worker.driver = nullptr;
  worker.stage.Clear();
  worker.refusals.clear();
}

void FakePipelineState::End(Stream& stream, const absl::Status& why) {
  if (stream.over) return;
  stream.over = true;
  stream.end = why;
  stream.commands.clear();
}

void FakePipelineState::EndEpochOf(std::shared_ptr<Stream> stream, const absl::Status& why) {
  End(*stream, why);
  if (stream->epoch.empty()) return;
  for (int i = 0; i < options_.stage_count; ++i) {
    if (!IsInEpochOf(i, *stream)) continue;
    End(*workers_[i].driver,
        absl::UnavailableError(absl::StrCat("link: epoch ", stream->epoch, " ended: ", why.message())));
    Clear(workers_[i]);
  }
}

void FakePipelineState::OpenEpoch(const std::shared_ptr<Stream>& stream, const v1::ExecuteRequest& request) {
  Worker& worker = workers_[stream->stage];
  if (!request.has_open() || request.open().epoch().empty()) {
    return End(*stream, absl::FailedPreconditionError("the first command is not `open`"));
  }
  const v1::OpenEpoch& open = request.open();
  if (open.stage_index() != stream->stage || open.stage_count() != options_.stage_count) {
    return End(*stream,
               absl::FailedPreconditionError(absl::StrCat("stage ", open.stage_index(), " of ", open.stage_count(),
                                                          " does not fit layers ", worker.stage.first_layer())));
  }
  if (worker.draining) return End(*stream, absl::UnavailableError("the worker drains"));
  if (worker.driver != nullptr && worker.driver->router != open.router()) {
    return End(*stream, absl::UnavailableError(absl::StrCat("router ", worker.driver->router, " drives this worker")));
  }
  if (worker.driver != nullptr) {
    EndEpochOf(worker.driver, absl::UnavailableError("a newer stream of the same router took over"));
  }
  stream->router = open.router();
  stream->epoch = open.epoch();
  worker.driver = stream;
  Advance();
}

void FakePipelineState::Advance() {
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0; i < options_.stage_count; ++i) {
      while (RunOne(i)) progress = true;
    }
    if (RunOwnStep()) progress = true;
  }
}

bool FakePipelineState::RunOne(int index) {
  Worker& worker = workers_[index];
  if (worker.driver == nullptr || worker.frozen) return false;
  Stream& stream = *worker.driver;
  if (!stream.opened) {
    // The link to the next stage stands when that stage is in the epoch, too.
    if (!IsLast(index) && !IsInEpochOf(index + 1, stream)) return false;
    stream.opened = true;
    stream.responses.emplace_back().mutable_opened();
    if (IsLast(index)) ++stats_.epochs;
    return true;
  }
  if (!conditions_.saves_held && !stream.held_saves.empty()) {
    stream.responses.push_back(std::move(stream.held_saves.front()));
    stream.held_saves.pop_front();
    return true;
  }
  if (stream.commands.empty()) return false;
  const v1::ExecuteRequest& head = stream.commands.front();
  if (conditions_.attaches_held && head.has_attach()) return false;
  if (head.has_step() && !IsStepDue(index)) return false;
  const v1::ExecuteRequest command = std::move(stream.commands.front());
  stream.commands.pop_front();
  ++stream.commands_taken;
  Run(index, command);
  return true;
}

// Refusals travel with the step, so a stage may be only one step ahead of the next.
bool FakePipelineState::IsStepDue(int index) {
  const Stream& stream = *workers_[index].driver;
  if (index > 0 && (!IsInEpochOf(index - 1, stream) || workers_[index - 1].driver->steps_done <= stream.steps_done)) {
    return false;
  }
  if (!IsLast(index) &&
      (!IsInEpochOf(index + 1, stream) || workers_[index + 1].driver->steps_done < stream.steps_done)) {
    return false;
  }
  if (index > 0 || !conditions_.steps_paused) return true;
  return conditions_.allowed_steps > 0 && conditions_.allowed_steps-- > 0;
}

void FakePipelineState::Run(int index, const v1::ExecuteRequest& command) {
  Worker& worker = workers_[index];
  switch (command.command_case()) {
    case v1::ExecuteRequest::kAttach: {
      const absl::Status status = worker.stage.Attach(command.attach());
      if (status.ok() && index == 0) own_steps_.OnAttach(command.attach());
      v1::SequenceAttached* attached = worker.driver->responses.emplace_back().mutable_attached();
      attached->set_slot(command.attach().slot());
      attached->set_sequence(command.attach().sequence());
      *attached->mutable_status() = ToProto(status);
      return;
    }
    case v1::ExecuteRequest::kStep:
      return RunStep(index, command.step());
    case v1::ExecuteRequest::kSave: {
      v1::ExecuteResponse answer;
      *answer.mutable_saved() = worker.stage.Save(command.save());
      (conditions_.saves_held ? worker.driver->held_saves : worker.driver->responses).push_back(std::move(answer));
      return;
    }
    case v1::ExecuteRequest::kRelease:
      if (index == 0) own_steps_.OnRelease(command.release());
      return worker.stage.Release(command.release());
    case v1::ExecuteRequest::kGoOn:
      if (index == 0) SendStopped(own_steps_.OnGoOn(command.go_on()));
      return;
    case v1::ExecuteRequest::kOpen:
    case v1::ExecuteRequest::COMMAND_NOT_SET:
      return EndEpochOf(worker.driver,
                        absl::InvalidArgumentError("a command that is not attach, step, save, release or go on"));
  }
}

bool FakePipelineState::RunOwnStep() {
  if (!own_steps_.ready() || (conditions_.steps_paused && conditions_.allowed_steps == 0)) return false;
  const std::shared_ptr<Stream>& first = workers_[0].driver;
  if (first == nullptr) return false;
  for (int i = 0; i < options_.stage_count; ++i) {
    if (!IsInEpochOf(i, *first) || workers_[i].frozen) return false;
    if (workers_[i].driver->steps_done != first->steps_done) return false;
    if (workers_[i].driver->commands_taken < first->commands_taken) return false;  // The first's order counts.
  }
  if (conditions_.steps_paused) --conditions_.allowed_steps;
  const v1::Step step = own_steps_.Next(options_.max_batch_tokens, options_.stage_count);
  for (int i = 0; i < options_.stage_count; ++i) RunStep(i, step);
  ++stats_.own_steps;
  return true;
}

void FakePipelineState::RunStep(int index, const v1::Step& step) {
  Worker& worker = workers_[index];
  Stream& stream = *worker.driver;
  int rows = 0;
  for (const v1::StepEntry& entry : step.entries()) rows += entry.token_ids_size();
  const bool is_own = step.step_id() == 0;
  if ((!is_own && step.step_id() != stream.steps_done + 1) || rows > options_.max_batch_tokens ||
      step.entries_size() == 0) {
    return EndEpochOf(worker.driver, absl::InvalidArgumentError(absl::StrCat("step ", step.step_id(), " with ", rows,
                                                                             " rows after step ", stream.steps_done)));
  }
  if (!is_own) ++stream.steps_done;
  if (index == 0) own_steps_.OnStep(step);
  FakeStage::Refusals refusals;
  if (index > 0) refusals = std::move(workers_[index - 1].refusals);
  std::vector<v1::LogitsRows> logits;
  v1::StepResult result = worker.stage.Step(step, refusals, logits);
  if (!IsLast(index)) {
    worker.refusals = std::move(refusals);
    return;
  }
  CountStep(step, rows, static_cast<int64_t>(refusals.size()));
  for (v1::LogitsRows& one : logits) *stream.responses.emplace_back().mutable_logits() = std::move(one);
  *stream.responses.emplace_back().mutable_step() = result;
  SendStopped(own_steps_.OnResult(result));
}

void FakePipelineState::CountStep(const v1::Step& step, int rows, int64_t refused) {
  ++stats_.steps;
  stats_.rows += rows;
  stats_.entries += step.entries_size();
  stats_.refused_entries += refused;
  stats_.max_rows_in_step = std::max(stats_.max_rows_in_step, rows);
  stats_.max_entries_in_step = std::max(stats_.max_entries_in_step, step.entries_size());
}

void FakePipelineState::SendStopped(const OwnSteps::Stopped& stopped) {
  for (const v1::SequenceStopped& one : stopped) {
    *workers_[0].driver->responses.emplace_back().mutable_stopped() = one;
  }
}

}  // namespace rwkv::worker
