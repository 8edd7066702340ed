// Links of one stage that say what a test wants, and whose rows go from device to device.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "kernels/base/stream.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/faulty_device.h"

namespace rwkv::worker {

// What a test says of the links of one stage, and sees of them. Thread-safe.
class LinkScript {
 public:
  // What the parts of both links answer.
  struct Answers {
    absl::Status connect, join, send, move, check, end, give_back;
  };
  void Set(Answers answers) {
    absl::MutexLock lock(&mu_);
    answers_ = std::move(answers);
  }
  Answers answers() {
    absl::MutexLock lock(&mu_);
    return answers_;
  }
  void Note(std::string what) {
    absl::MutexLock lock(&mu_);
    notes_.push_back(std::move(what));
  }
  std::vector<std::string> notes() {
    absl::MutexLock lock(&mu_);
    return notes_;
  }
  // What the stage before sends.
  void Push(LinkHeader header) {
    absl::MutexLock lock(&mu_);
    headers_.push_back(std::move(header));
  }
  absl::Status TakeHeader(LinkHeader& header) {
    absl::MutexLock lock(&mu_);
    const auto comes = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return aborted_ || !headers_.empty(); };
    mu_.Await(absl::Condition(&comes));
    if (aborted_) return absl::UnavailableError("link: aborted");
    header = std::move(headers_.front());
    headers_.pop_front();
    return absl::OkStatus();
  }
  bool HasHeader() {
    absl::MutexLock lock(&mu_);
    return aborted_ || !headers_.empty();
  }
  void AbortHeaders() {
    absl::MutexLock lock(&mu_);
    aborted_ = true;
  }
  // Whoever sends waits, until they are let go.
  void HoldSends(bool hold) {
    absl::MutexLock lock(&mu_);
    holds_sends_ = hold;
  }
  void AwaitSends() {
    absl::MutexLock lock(&mu_);
    const auto goes = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !holds_sends_; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&goes), absl::Seconds(60)));
  }
  // The host looks after rows that a step waits for.
  void NoteCheck() {
    absl::MutexLock lock(&mu_);
    is_checked_ = true;
  }
  bool WaitForCheck() {
    absl::MutexLock lock(&mu_);
    return mu_.AwaitWithTimeout(absl::Condition(&is_checked_), absl::Seconds(60));
  }
  // What the next one returns.
  void SetDrawn(LinkSender::Drawn drawn) {
    absl::MutexLock lock(&mu_);
    drawn_ = std::move(drawn);
  }
  void Drawn(const v1::StepResult& drawn) {
    LinkSender::Drawn call;
    {
      absl::MutexLock lock(&mu_);
      call = drawn_;
    }
    call(drawn);
  }
  bool WaitForNotes(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return notes_.size() >= count; };
    return mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(60));
  }

 private:
  absl::Mutex mu_;
  Answers answers_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> notes_ ABSL_GUARDED_BY(mu_);
  std::deque<LinkHeader> headers_ ABSL_GUARDED_BY(mu_);
  bool aborted_ ABSL_GUARDED_BY(mu_) = false;
  bool holds_sends_ ABSL_GUARDED_BY(mu_) = false;
  bool is_checked_ ABSL_GUARDED_BY(mu_) = false;
  LinkSender::Drawn drawn_ ABSL_GUARDED_BY(mu_);
};

class ScriptedRows final : public DeviceRows {
 public:
  ScriptedRows(std::string name, LinkScript* script, DeviceFaults* faults)
      : name_(std::move(name)), script_(script), faults_(faults) {}
  absl::Status Move(int64_t rows, float* x, float* v_first, kernels::Stream& stream) override {
    script_->Note(absl::StrCat(name_, " moves ", rows));
    return script_->answers().move;
  }
  absl::Status Check() override {
    script_->NoteCheck();
    return script_->answers().check;
  }
  absl::Status End() override {
    script_->Note(absl::StrCat(name_, " ends"));
    faults_->GoOn();
    return script_->answers().end;
  }

 private:
  const std::string name_;
  LinkScript* const script_;
  DeviceFaults* const faults_;
};

class ScriptedSender final : public LinkSender {
 public:
  ScriptedSender(LinkScript* script, DeviceFaults* faults) : script_(script), rows_("output", script, faults) {}
  void NotifyDrawn(Drawn drawn) override { script_->SetDrawn(std::move(drawn)); }
  absl::Status Connect() override { return script_->answers().connect; }
  DeviceRows* device_rows() override { return &rows_; }
  absl::Status Send(const LinkFrame& frame) override {
    EXPECT_EQ(frame.rows, &rows_);
    script_->AwaitSends();
    const std::string own = frame.header.is_own() ? absl::StrCat(" own after ", frame.header.commands_before) : "";
    script_->Note(absl::StrCat("sent ", frame.header.rows, own));
    return script_->answers().send;
  }
  void Abort() override {}

 private:
  LinkScript* const script_;
  ScriptedRows rows_;
};

class ScriptedReceiver final : public LinkReceiver {
 public:
  ScriptedReceiver(LinkScript* script, DeviceFaults* faults) : script_(script), rows_("input", script, faults) {}
  absl::Status Join() override { return script_->answers().join; }
  DeviceRows* device_rows() override { return &rows_; }
  absl::Status Receive(LinkFrame& frame) override {
    frame.rows = &rows_;
    return script_->TakeHeader(frame.header);
  }
  bool Ready() override { return script_->HasHeader(); }
  void NotifyFrames(Coming coming) override {}
  absl::Status Return(const v1::StepResult& drawn) override {
    script_->Note(absl::StrCat("returned ", drawn.entries(0).position()));
    return script_->answers().give_back;
  }
  void NotifyBroken(std::function<void(const absl::Status&)> broken) override {}
  void Abort() override { script_->AbortHeaders(); }

 private:
  LinkScript* const script_;
  ScriptedRows rows_;
};

class ScriptedLinks final : public LinkTransport {
 public:
  ScriptedLinks(LinkScript* script, DeviceFaults* faults) : script_(script), faults_(faults) {}
  std::unique_ptr<LinkReceiver> Accept(const std::string& epoch) override {
    return std::make_unique<ScriptedReceiver>(script_, faults_);
  }
  std::unique_ptr<LinkSender> Dial(const std::string& address, const std::string& epoch) override {
    return std::make_unique<ScriptedSender>(script_, faults_);
  }

 private:
  LinkScript* const script_;
  DeviceFaults* const faults_;
};

}  // namespace rwkv::worker
