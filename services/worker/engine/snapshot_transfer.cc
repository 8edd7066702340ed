#include "services/worker/engine/snapshot_transfer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/client/crc32c.h"

namespace rwkv::worker {
namespace {

// Records that follow each other.
struct Run {
  size_t begin = 0;
  size_t count = 0;
};

// All records, in order, in runs of at most `bytes`, the first of `first_bytes`, or of one record.
template <typename T>
std::vector<Run> Runs(absl::Span<const absl::Span<T>> records, size_t first_bytes, size_t bytes) {
  std::vector<Run> runs;
  size_t room = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    if (runs.empty() || records[i].size() > room) {
      room = std::max(runs.empty() ? first_bytes : bytes, records[i].size());
      runs.push_back({i, 0});
    }
    ++runs.back().count;
    room -= records[i].size();
  }
  return runs;
}

std::string Name(absl::Span<const v1::RecordInfo> infos) {
  const int first = infos.front().layer(), last = infos.back().layer();
  return absl::StrCat("snapshot ", infos.front().snapshot_id(), first == last ? ", layer " : ", layers ", first,
                      first == last ? "" : absl::StrCat(" to ", last));
}

}  // namespace

SnapshotTransfer::SnapshotTransfer(const Options& options, WorkerMetrics* metrics)
    : options_(options), metrics_(metrics) {
  for (int i = 0; i < options_.load_threads; ++i) threads_.emplace_back([this] { LoadLoop(); });
  for (int i = 0; i < options_.save_threads; ++i) threads_.emplace_back([this] { SaveLoop(); });
}

SnapshotTransfer::~SnapshotTransfer() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    loads_.clear();
    saves_.clear();
  }
  for (std::thread& thread : threads_) thread.join();
}

absl::Status SnapshotTransfer::Load(LoadJob job) {
  absl::MutexLock lock(&mu_);
  if (loads_.size() >= static_cast<size_t>(options_.max_waiting_loads)) {
    return absl::ResourceExhaustedError(absl::StrCat(loads_.size(), " snapshots are waiting to be loaded"));
  }
  loads_.push_back({std::move(job), absl::Now()});
  return absl::OkStatus();
}

absl::Status SnapshotTransfer::CheckRoomLocked(const std::string& snapshot_id, int64_t bytes) {
  if (save_bytes_ == 0 || save_bytes_ + bytes <= options_.max_save_bytes) return absl::OkStatus();
  metrics_->save_overflows.Increment();
  return absl::ResourceExhaustedError(absl::StrCat("snapshot ", snapshot_id, ": ", save_bytes_,
                                                   " bytes of snapshots are on their way, at most ",
                                                   options_.max_save_bytes));
}

absl::Status SnapshotTransfer::CheckRoom(const std::string& snapshot_id, int64_t bytes) {
  absl::MutexLock lock(&mu_);
  return CheckRoomLocked(snapshot_id, bytes);
}

absl::Status SnapshotTransfer::Save(SaveJob job) {
  absl::MutexLock lock(&mu_);
  RWKV_RETURN_IF_ERROR(CheckRoomLocked(job.snapshot_id, job.bytes));
  save_bytes_ += job.bytes;
  metrics_->snapshot_bytes_in_flight.Set(static_cast<double>(save_bytes_));
  saves_.push_back({std::move(job), absl::Now()});
  return absl::OkStatus();
}

bool SnapshotTransfer::WaitUntilSaved(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithDeadline(absl::Condition(this, &SnapshotTransfer::NothingToSave), deadline);
}

void SnapshotTransfer::LoadLoop() {
  for (;;) {
    TimedLoad load;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &SnapshotTransfer::HasLoad));
      if (stopping_) return;
      if (Help(loading_)) continue;
      load = std::move(loads_.front());
      loads_.pop_front();
    }
    if (!load.job.wanted()) continue;
    const absl::Status status = RunLoad(load.job);
    if (status.ok()) metrics_->snapshot_load_seconds.Observe(absl::ToDoubleSeconds(absl::Now() - load.begin));
    load.job.done(status);
  }
}

void SnapshotTransfer::SaveLoop() {
  for (;;) {
    TimedSave save;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &SnapshotTransfer::HasSave));
      if (stopping_) return;
      if (Help(storing_)) continue;
      save = std::move(saves_.front());
      saves_.pop_front();
      ++saving_;
    }
    if (save.job.wanted()) {
      absl::StatusOr<std::vector<v1::RecordInfo>> records = RunSave(save.job);
      if (records.ok()) {
        metrics_->snapshot_save_seconds.Observe(absl::ToDoubleSeconds(absl::Now() - save.begin));
      } else {
        metrics_->save_errors.Increment();
      }
      save.job.done(std::move(records));
    }
    const int64_t bytes = save.job.bytes;
    save.job = SaveJob();  // Its memory is free before others may take as much.
    absl::MutexLock lock(&mu_);
    --saving_;
    save_bytes_ -= bytes;
    metrics_->snapshot_bytes_in_flight.Set(static_cast<double>(save_bytes_));
  }
}

bool SnapshotTransfer::HasWork(const Batches& batches) {
  return std::any_of(batches.begin(), batches.end(), [](const Batch* batch) { return batch->HasWork(); });
}

bool SnapshotTransfer::Help(Batches& batches) {
  for (Batch* const batch : batches) {
    if (!batch->HasWork()) continue;
    WorkAt(*batch);
    return true;
  }
  return false;
}

void SnapshotTransfer::WorkAt(Batch& batch) {
  ++batch.working;  // It stays until this is 0.
  while (batch.HasWork()) {
    const size_t index = batch.next++;
    mu_.Unlock();
    const absl::Status status = batch.run(index);
    mu_.Lock();
    batch.status.Update(status);
  }
  --batch.working;
}

absl::Status SnapshotTransfer::RunAll(Batches SnapshotTransfer::*batches, size_t count,
                                      absl::FunctionRef<absl::Status(size_t)> run) {
  Batch batch{count, run, 0, 0, absl::OkStatus()};
  const auto over = [&batch] { return batch.working == 0; };
  absl::MutexLock lock(&mu_);
  const auto it = (this->*batches).insert((this->*batches).end(), &batch);
  WorkAt(batch);
  (this->*batches).erase(it);
  mu_.Await(absl::Condition(&over));
  return batch.status;
}

absl::Status SnapshotTransfer::RunLoad(const LoadJob& job) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<absl::Span<char>> room, job.room());
  if (room.size() != job.records.size()) {
    return absl::DataLossError(absl::StrCat(job.records.size(), " state records for ", room.size(), " layers"));
  }
  size_t bytes = 0;
  for (const absl::Span<char> record : room) bytes += record.size();
  const size_t share = bytes / static_cast<size_t>(options_.load_threads);
  const size_t call_bytes = std::min(options_.load_call_bytes, std::max(options_.min_load_call_bytes, share));
  const std::vector<Run> calls = Runs<char>(room, call_bytes, call_bytes);
  return RunAll(&SnapshotTransfer::loading_, calls.size(), [&](size_t i) -> absl::Status {
    if (!job.wanted()) return absl::CancelledError("no longer wanted");
    const common::ScopedTrace scope(job.trace);  // Of this thread: others may help.
    const auto infos = absl::MakeConstSpan(job.records).subspan(calls[i].begin, calls[i].count);
    const absl::Status status = job.store->ReadRecords(
        infos, absl::MakeConstSpan(room).subspan(calls[i].begin, calls[i].count), absl::Now() + options_.call_timeout);
    if (status.ok()) return status;
    // To the router a record that is gone and one that is damaged are the same: the snapshot is of no use.
    const absl::StatusCode code = absl::IsNotFound(status) ? absl::StatusCode::kDataLoss : status.code();
    return absl::Status(code, absl::StrCat(Name(infos), ": ", status.message()));
  });
}

absl::StatusOr<std::vector<v1::RecordInfo>> SnapshotTransfer::RunSave(const SaveJob& job) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<absl::Span<const char>> records, job.records());
  std::vector<v1::RecordInfo> infos(records.size());
  const std::vector<Run> calls = Runs<const char>(records, options_.first_save_call_bytes, options_.save_call_bytes);
  RWKV_RETURN_IF_ERROR(RunAll(&SnapshotTransfer::storing_, calls.size(), [&](size_t i) -> absl::Status {
    if (!job.wanted()) return absl::CancelledError("no longer wanted");
    const common::ScopedTrace scope(job.trace);
    const auto sent = absl::MakeSpan(infos).subspan(calls[i].begin, calls[i].count);
    for (size_t j = 0; j < sent.size(); ++j) {
      const size_t layer = calls[i].begin + j;
      sent[j].set_snapshot_id(job.snapshot_id);
      sent[j].set_layer(job.first_layer + static_cast<int>(layer));
      sent[j].set_bytes(records[layer].size());
      sent[j].set_crc32c(state_store::Crc32c(records[layer]));
    }
    const absl::Status status =
        job.store->PutRecords(sent, absl::MakeConstSpan(records).subspan(calls[i].begin, calls[i].count),
                              records.size(), job.owner, absl::Now() + options_.call_timeout);
    return status.ok() ? status : absl::Status(status.code(), absl::StrCat(Name(sent), ": ", status.message()));
  }));
  return infos;
}

}  // namespace rwkv::worker
