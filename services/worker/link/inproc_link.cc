#include "services/worker/link/inproc_link.h"

#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::worker {
namespace {

constexpr size_t kMaxFrames = 4;  // Under way; then Send waits.
constexpr absl::Duration kConnectTimeout = absl::Seconds(10);

// What both ends share.
class Pipe {
 public:
  explicit Pipe(const LinkShape& shape) : shape_(shape) {}

  absl::Status Send(const LinkFrame& frame) {
    Sent sent;
    sent.header = frame.header;
    sent.x.assign(frame.x, frame.x + frame.header.rows * shape_.width);
    sent.v_first.assign(frame.v_first, frame.v_first + frame.header.rows * shape_.v_first_width);
    LinkReceiver::Coming coming;
    {
      absl::MutexLock lock(&mu_);
      coming = coming_;
    }
    if (coming) coming(sent.header.is_own() ? absl::make_optional(sent.header.commands_before) : absl::nullopt);
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Pipe::HasRoom));
    if (aborted_) return absl::UnavailableError("link: aborted");
    frames_.push_back(std::move(sent));
    return absl::OkStatus();
  }

  // Under the lock, so that nothing is called once the sender has taken its function away.
  absl::Status Return(const v1::StepResult& drawn) {
    absl::MutexLock lock(&mu_);
    if (aborted_) return absl::UnavailableError("link: aborted");
    if (drawn_) drawn_(drawn);
    return absl::OkStatus();
  }

  void NotifyFrames(LinkReceiver::Coming coming) {
    absl::MutexLock lock(&mu_);
    coming_ = std::move(coming);
  }

  void NotifyDrawn(LinkSender::Drawn drawn) {
    absl::MutexLock lock(&mu_);
    drawn_ = std::move(drawn);
  }

  absl::Status Receive(LinkFrame& frame) {
    Sent sent;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &Pipe::HasFrame));
      if (aborted_) return absl::UnavailableError("link: aborted");
      sent = std::move(frames_.front());
      frames_.pop_front();
      if (absl::Status status = CheckHeader(sent.header, shape_, next_step_); !status.ok()) return status;
      ++next_step_;
    }
    frame.header = std::move(sent.header);
    std::copy(sent.x.begin(), sent.x.end(), frame.x);
    std::copy(sent.v_first.begin(), sent.v_first.end(), frame.v_first);
    return absl::OkStatus();
  }

  bool Ready() {
    absl::MutexLock lock(&mu_);
    return HasFrame();
  }

  // `by_sender`: the receiver hears of it.
  void Abort(bool by_sender) {
    std::function<void(const absl::Status&)> broken;
    {
      absl::MutexLock lock(&mu_);
      broken = std::move(broken_);
      if (aborted_) return;
      aborted_ = true;
      broken_by_sender_ = by_sender;
      frames_.clear();
    }
    if (by_sender && broken) broken(Gone());
  }

  void NotifyBroken(std::function<void(const absl::Status&)> broken) {
    {
      absl::MutexLock lock(&mu_);
      if (!aborted_) {
        broken_ = std::move(broken);
        return;
      }
      if (!broken_by_sender_) return;
    }
    broken(Gone());
  }

 private:
  struct Sent {
    LinkHeader header;
    std::vector<float> x, v_first;
  };

  static absl::Status Gone() { return absl::UnavailableError("link: the stage before is gone"); }

  bool HasRoom() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return aborted_ || frames_.size() < kMaxFrames; }
  bool HasFrame() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return aborted_ || !frames_.empty(); }

  const LinkShape shape_;
  absl::Mutex mu_;
  std::deque<Sent> frames_ ABSL_GUARDED_BY(mu_);
  uint64_t next_step_ ABSL_GUARDED_BY(mu_) = 1;
  bool aborted_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_by_sender_ ABSL_GUARDED_BY(mu_) = false;
  std::function<void(const absl::Status&)> broken_ ABSL_GUARDED_BY(mu_);
  LinkReceiver::Coming coming_ ABSL_GUARDED_BY(mu_);
  LinkSender::Drawn drawn_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

// Epochs that are accepted, and frames that were sent, by address.
class InprocLinkTable {
 public:
  using Key = std::pair<std::string, std::string>;

  void Add(const Key& key, std::shared_ptr<Pipe> pipe) {
    absl::MutexLock lock(&mu_);
    pipes_[key] = std::move(pipe);
  }

  void Remove(const Key& key, const std::shared_ptr<Pipe>& pipe) {
    absl::MutexLock lock(&mu_);
    const auto it = pipes_.find(key);
    if (it != pipes_.end() && it->second == pipe) pipes_.erase(it);
  }

  // Waits for the receiver; null after the limit or once `aborted`.
  std::shared_ptr<Pipe> Find(const Key& key, const bool& aborted) {
    absl::MutexLock lock(&mu_);
    const auto found = [this, &key, &aborted]()
                           ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return aborted || pipes_.contains(key); };
    mu_.AwaitWithTimeout(absl::Condition(&found), kConnectTimeout);
    const auto it = pipes_.find(key);
    return aborted || it == pipes_.end() ? nullptr : it->second;
  }

  // A sender's `aborted` flag lives under this lock, so that Find wakes up.
  void Set(bool& flag) {
    absl::MutexLock lock(&mu_);
    flag = true;
  }

  bool IsSet(const bool& flag) {
    absl::MutexLock lock(&mu_);
    return flag;
  }

  void CountFrame(const std::string& address) {
    absl::MutexLock lock(&mu_);
    ++frames_[address];
  }

  int64_t FramesSent(const std::string& address) {
    absl::MutexLock lock(&mu_);
    return frames_[address];
  }

  bool WaitForFrames(const std::string& address, int64_t count, absl::Duration limit) {
    absl::MutexLock lock(&mu_);
    const auto sent = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return frames_[address] >= count; };
    return mu_.AwaitWithTimeout(absl::Condition(&sent), limit);
  }

 private:
  absl::Mutex mu_;
  absl::flat_hash_map<std::string, int64_t> frames_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Key, std::shared_ptr<Pipe>> pipes_ ABSL_GUARDED_BY(mu_);
};

namespace {

class InprocReceiver final : public LinkReceiver {
 public:
  InprocReceiver(std::shared_ptr<InprocLinkTable> table, InprocLinkTable::Key key, std::shared_ptr<Pipe> pipe)
      : table_(std::move(table)), key_(std::move(key)), pipe_(std::move(pipe)) {
    table_->Add(key_, pipe_);
  }
  ~InprocReceiver() override {
    table_->Remove(key_, pipe_);
    pipe_->Abort(false);
  }
  absl::Status Receive(LinkFrame& frame) override { return pipe_->Receive(frame); }
  bool Ready() override { return pipe_->Ready(); }
  void NotifyFrames(LinkReceiver::Coming coming) override { pipe_->NotifyFrames(std::move(coming)); }
  absl::Status Return(const v1::StepResult& drawn) override { return pipe_->Return(drawn); }
  void NotifyBroken(std::function<void(const absl::Status&)> broken) override {
    pipe_->NotifyBroken(std::move(broken));
  }
  void Abort() override { pipe_->Abort(false); }

 private:
  const std::shared_ptr<InprocLinkTable> table_;
  const InprocLinkTable::Key key_;
  const std::shared_ptr<Pipe> pipe_;
};

class InprocSender final : public LinkSender {
 public:
  InprocSender(std::shared_ptr<InprocLinkTable> table, InprocLinkTable::Key key)
      : table_(std::move(table)), key_(std::move(key)) {}
  ~InprocSender() override {
    Abort();
    if (const std::shared_ptr<Pipe> pipe = this->pipe(); pipe != nullptr) pipe->NotifyDrawn(nullptr);
  }

  void NotifyDrawn(Drawn drawn) override { drawn_ = std::move(drawn); }

  absl::Status Connect() override {
    std::shared_ptr<Pipe> pipe = table_->Find(key_, aborted_);
    if (pipe == nullptr) {
      return absl::UnavailableError(absl::StrCat("link: ", key_.first, " has no epoch ", key_.second));
    }
    pipe->NotifyDrawn(drawn_);
    {
      absl::MutexLock lock(&mu_);
      pipe_ = pipe;
    }
    if (table_->IsSet(aborted_)) pipe->Abort(true);  // An Abort that came in between saw no pipe.
    return absl::OkStatus();
  }

  absl::Status Send(const LinkFrame& frame) override {
    const std::shared_ptr<Pipe> pipe = this->pipe();
    if (pipe == nullptr) return absl::UnavailableError("link: not connected");
    const absl::Status status = pipe->Send(frame);
    if (status.ok()) table_->CountFrame(key_.first);
    return status;
  }

  void Abort() override {
    table_->Set(aborted_);
    if (const std::shared_ptr<Pipe> pipe = this->pipe(); pipe != nullptr) pipe->Abort(true);
  }

 private:
  std::shared_ptr<Pipe> pipe() {
    absl::MutexLock lock(&mu_);
    return pipe_;
  }

  const std::shared_ptr<InprocLinkTable> table_;
  const InprocLinkTable::Key key_;
  Drawn drawn_;
  bool aborted_ = false;  // Guarded by the table's lock.
  absl::Mutex mu_;
  std::shared_ptr<Pipe> pipe_ ABSL_GUARDED_BY(mu_);
};

class InprocTransport final : public LinkTransport {
 public:
  InprocTransport(std::shared_ptr<InprocLinkTable> table, std::string address, const LinkShape& shape)
      : table_(std::move(table)), address_(std::move(address)), shape_(shape) {}

  std::unique_ptr<LinkReceiver> Accept(const std::string& epoch) override {
    return std::make_unique<InprocReceiver>(table_, std::make_pair(address_, epoch), std::make_shared<Pipe>(shape_));
  }
  std::unique_ptr<LinkSender> Dial(const std::string& address, const std::string& epoch) override {
    return std::make_unique<InprocSender>(table_, std::make_pair(address, epoch));
  }

 private:
  const std::shared_ptr<InprocLinkTable> table_;
  const std::string address_;
  const LinkShape shape_;
};

}  // namespace

InprocLinkNetwork::InprocLinkNetwork() : table_(std::make_shared<InprocLinkTable>()) {}
InprocLinkNetwork::~InprocLinkNetwork() = default;

std::unique_ptr<LinkTransport> InprocLinkNetwork::Join(const std::string& address, const LinkShape& shape) {
  return std::make_unique<InprocTransport>(table_, address, shape);
}

int64_t InprocLinkNetwork::FramesSent(const std::string& address) const { return table_->FramesSent(address); }

bool InprocLinkNetwork::WaitForFrames(const std::string& address, int64_t count, absl::Duration limit) const {
  return table_->WaitForFrames(address, count, limit);
}

}  // namespace rwkv::worker
