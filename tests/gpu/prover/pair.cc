// Two processes, of which one sends rows to the other by NCCL. Each takes orders on standard input and answers on
// standard output, a line each, so that whoever orders can kill one of them at any time.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/nccl.h"
#include "services/worker/link/nccl_link.h"
#include "services/worker/link/testing/fake_nccl.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"

namespace rwkv::gpu {
namespace {

using kernels::MemoryKind;
using Floats = kernels::DeviceArray<float>;

constexpr worker::LinkShape kShape = {4096, 4096, 16};
constexpr int64_t kRows = 16;
constexpr double kSilence = 3;   // Seconds in which one transfer must be done.
constexpr int kPatience = 120;   // Seconds for an answer: NCCL's first connection takes some.
constexpr double kHeard = 10;    // Seconds in which an end must have heard that the other one is dead or silent.
constexpr int kMovesBegun = 20;  // After so many a long series says that it has begun.
constexpr int kForever = 1 << 30;

// What row data the `move`-th transfer carries.
float Value(int move, int64_t i) { return static_cast<float>((move * 31 + i) % 8191); }

class End {
 public:
  End(Gpu gpu, std::unique_ptr<worker::DeviceLinks> links, bool sends)
      : gpu_(std::move(gpu)), links_(std::move(links)), sends_(sends) {}

  absl::Status Init() {
    RWKV_ASSIGN_OR_RETURN(stream_, gpu_.device->NewStream());
    RWKV_ASSIGN_OR_RETURN(done_, gpu_.device->NewEvent());
    for (Floats* array : {&x_, &v_first_}) {
      RWKV_ASSIGN_OR_RETURN(*array, Floats::Create(*gpu_.device, kRows * kShape.width));
    }
    RWKV_ASSIGN_OR_RETURN(host_, Floats::Create(*gpu_.device, kRows * kShape.width, MemoryKind::kPinned));
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Obey(const std::string& order) {
    const std::vector<std::string> words = absl::StrSplit(order, ' ');
    if (words[0] == "id") {
      RWKV_ASSIGN_OR_RETURN(const std::string id, links_->NewPairId());
      return absl::BytesToHexString(id);
    }
    if (words[0] == "join" && words.size() == 2) {
      RWKV_ASSIGN_OR_RETURN(rows_, links_->Join(absl::HexStringToBytes(words[1]), sends_, kShape, never_));
      return std::string("joined");
    }
    int count = 0;
    if (words[0] == "move" && words.size() == 2 && absl::SimpleAtoi(words[1], &count)) {
      const double begin = Now();
      for (int move = 0; move < count; ++move) {
        RWKV_RETURN_IF_ERROR(Move(move));
        if (count == kForever && move == kMovesBegun) std::cout << "begun" << std::endl;
      }
      return absl::StrFormat("moved %.2f", (Now() - begin) / count * 1e6);
    }
    if (words[0] == "end") {
      const double begin = Now();
      RWKV_RETURN_IF_ERROR(rows_->End());
      rows_.reset();
      RWKV_RETURN_IF_ERROR(stream_->Synchronize());  // It goes on.
      return absl::StrFormat("ended %.2f", (Now() - begin) * 1e3);
    }
    return absl::InvalidArgumentError(order);
  }

 private:
  absl::Status Move(int move) {
    const bool looks = move < kMovesBegun || move % 97 == 0;
    if (sends_ && looks) {
      for (int64_t i = 0; i < host_.size(); ++i) host_.data()[i] = Value(move, i);
      RWKV_RETURN_IF_ERROR(stream_->Copy(x_.data(), host_.data(), x_.size_in_bytes()));
      RWKV_RETURN_IF_ERROR(stream_->Copy(v_first_.data(), host_.data(), x_.size_in_bytes()));
    }
    RWKV_RETURN_IF_ERROR(rows_->Move(kRows, x_.data(), v_first_.data(), *stream_));
    if (!sends_ && looks) {
      RWKV_RETURN_IF_ERROR(stream_->Copy(host_.data(), (move % 2 == 0 ? x_ : v_first_).data(), x_.size_in_bytes()));
    }
    RWKV_RETURN_IF_ERROR(stream_->Record(*done_));
    for (const double begin = Now(); !done_->Done();) {
      RWKV_RETURN_IF_ERROR(rows_->Check());
      if (Now() - begin > kSilence) return absl::DeadlineExceededError("the other end is silent");
    }
    RWKV_RETURN_IF_ERROR(rows_->Check());
    RWKV_RETURN_IF_ERROR(done_->WaitOnHost());
    for (int64_t i = 0; !sends_ && looks && i < host_.size(); ++i) {
      if (host_.data()[i] == Value(move, i)) continue;
      return absl::DataLossError(
          absl::StrCat("transfer ", move, ": [", i, "] is ", host_.data()[i], ", not ", Value(move, i)));
    }
    return absl::OkStatus();
  }

  const Gpu gpu_;
  const std::unique_ptr<worker::DeviceLinks> links_;
  const bool sends_;
  const absl::Notification never_;
  std::unique_ptr<kernels::Stream> stream_;
  std::unique_ptr<kernels::Event> done_;
  Floats x_, v_first_, host_;
  std::unique_ptr<worker::DeviceRows> rows_;
};

// One of the two processes, as whoever orders sees it.
class Child {
 public:
  Child(std::string program, std::string device, std::string end)
      : program_(std::move(program)), device_(std::move(device)), end_(std::move(end)) {}
  ~Child() { Kill(); }

  absl::Status Start() {
    int orders[2], answers[2];
    if (pipe2(orders, O_CLOEXEC) != 0 || pipe2(answers, O_CLOEXEC) != 0) return absl::InternalError("no pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, orders[0], 0);
    posix_spawn_file_actions_adddup2(&actions, answers[1], 1);
    // Another machine, as far as NCCL knows: else it refuses two ranks on one GPU.
    std::vector<std::string> settings = {absl::StrCat("NCCL_HOSTID=", end_), "NCCL_SOCKET_IFNAME=lo",
                                         "NCCL_NET=Socket"};
    for (char** variable = environ; *variable != nullptr; ++variable) settings.emplace_back(*variable);
    std::vector<char*> environment;
    for (std::string& setting : settings) environment.push_back(setting.data());
    environment.push_back(nullptr);
    std::string name = "pair_end";
    char* arguments[] = {program_.data(), name.data(), device_.data(), end_.data(), nullptr};
    const int error = posix_spawn(&process_, program_.c_str(), &actions, nullptr, arguments, environment.data());
    posix_spawn_file_actions_destroy(&actions);
    close(orders[0]);
    close(answers[1]);
    orders_ = orders[1];
    answers_ = answers[0];
    if (error != 0) {
      process_ = -1;
      return absl::InternalError(absl::StrCat(program_, ": cannot be started"));
    }
    return absl::OkStatus();
  }

  absl::Status Order(const std::string& order) {
    const std::string line = absl::StrCat(order, "\n");
    if (write(orders_, line.data(), line.size()) == static_cast<ssize_t>(line.size())) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat(end_, " takes no orders"));
  }

  absl::StatusOr<std::string> Answer() {
    const double limit = Now() + kPatience;
    while (true) {
      if (const size_t at = text_.find('\n'); at != std::string::npos) {
        std::string line = text_.substr(0, at);
        text_.erase(0, at + 1);
        return line;
      }
      pollfd wait = {answers_, POLLIN, 0};
      const double left = limit - Now();
      if (left <= 0 || poll(&wait, 1, static_cast<int>(left * 1e3) + 1) == 0) {
        return absl::DeadlineExceededError(absl::StrCat(end_, " does not answer"));
      }
      char some[4096];
      const ssize_t count = read(answers_, some, sizeof(some));
      if (count <= 0) return absl::UnavailableError(absl::StrCat(end_, " has ended"));
      text_.append(some, static_cast<size_t>(count));
    }
  }

  // The number behind `word`, which the answer must begin with.
  absl::StatusOr<double> Expect(const std::string& word) {
    RWKV_ASSIGN_OR_RETURN(const std::string answer, Answer());
    double number = 0;
    if (!absl::StartsWith(answer, word)) return absl::InternalError(absl::StrCat(end_, ": ", answer));
    (void)absl::SimpleAtod(answer.substr(word.size()), &number);
    return number;
  }

  void Signal(int signal) {
    if (process_ > 0) kill(process_, signal);
  }

  void Kill() {
    Signal(SIGKILL);
    (void)Wait();
  }

  // It has been told nothing more.
  absl::Status Finish() {
    close(orders_);
    orders_ = -1;
    const int status = Wait();
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return absl::OkStatus();
    return absl::InternalError(absl::StrCat(end_, " ends with status ", status));
  }

 private:
  int Wait() {
    int status = 0;
    if (process_ > 0) waitpid(process_, &status, 0);
    process_ = -1;
    for (int* file : {&orders_, &answers_}) {
      if (*file >= 0) close(*file);
      *file = -1;
    }
    text_.clear();
    return status;
  }

  std::string program_, device_, end_;
  pid_t process_ = -1;
  int orders_ = -1;
  int answers_ = -1;
  std::string text_;
};

absl::Status Join(Child& sender, Child& receiver) {
  RWKV_RETURN_IF_ERROR(receiver.Order("id"));
  RWKV_ASSIGN_OR_RETURN(const std::string id, receiver.Answer());
  for (Child* child : {&sender, &receiver}) RWKV_RETURN_IF_ERROR(child->Order(absl::StrCat("join ", id)));
  for (Child* child : {&sender, &receiver}) RWKV_RETURN_IF_ERROR(child->Expect("joined").status());
  return absl::OkStatus();
}

absl::StatusOr<double> MoveRows(Child& sender, Child& receiver, int count) {
  for (Child* child : {&sender, &receiver}) RWKV_RETURN_IF_ERROR(child->Order(absl::StrCat("move ", count)));
  RWKV_RETURN_IF_ERROR(sender.Expect("moved").status());
  return receiver.Expect("moved");
}

// While rows move the sender gets a signal. The receiver must hear of it, end the pair and make another with a new one.
absl::Status Disturb(Child& sender, Child& receiver, int signal, const char* what) {
  for (Child* child : {&sender, &receiver}) RWKV_RETURN_IF_ERROR(child->Order(absl::StrCat("move ", kForever)));
  for (Child* child : {&sender, &receiver}) RWKV_RETURN_IF_ERROR(child->Expect("begun").status());
  const double disturbed = Now();
  sender.Signal(signal);
  RWKV_ASSIGN_OR_RETURN(const std::string failure, receiver.Answer());
  const double heard = Now();
  // Of the other end, and nothing else: rows that are wrong are no such thing.
  const bool is_of_other = absl::StartsWith(failure, "failed: UNAVAILABLE") ||
                           absl::StartsWith(failure, "failed: DEADLINE_EXCEEDED") ||
                           absl::StartsWith(failure, "failed: INTERNAL");
  if (!is_of_other || heard - disturbed > kHeard) {
    return absl::InternalError(
        absl::StrFormat("the receiver says %.1f s after the sender was %s: %s", heard - disturbed, what, failure));
  }
  RWKV_RETURN_IF_ERROR(receiver.Order("end"));
  RWKV_ASSIGN_OR_RETURN(const double abort, receiver.Expect("ended"));
  const double begin = Now();
  sender.Kill();
  RWKV_RETURN_IF_ERROR(sender.Start());
  RWKV_RETURN_IF_ERROR(Join(sender, receiver));
  RWKV_RETURN_IF_ERROR(MoveRows(sender, receiver, 50).status());
  std::cout << absl::StrFormat(
                   "{\"pair\": \"sender %s\", \"heard_ms\": %.1f, \"abort_ms\": %.2f, \"with_a_new_one_ms\": %.1f}",
                   what, (heard - disturbed) * 1e3, abort, (Now() - begin) * 1e3)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace

absl::Status PairEnd(const std::string& device, const std::string& end) {
  worker::nccl::SetEnvironment();
  worker::nccl::Nccl nccl = worker::nccl::kFakeNccl;
  if (!IsEmulated(device)) {
    RWKV_ASSIGN_OR_RETURN(nccl, worker::nccl::Load(worker::nccl::kLibrary));
  }
  RWKV_ASSIGN_OR_RETURN(Gpu gpu, OpenGpu(device));
  kernels::Device* const bound = gpu.device.get();
  worker::NcclLimits limits;
  limits.call = absl::Seconds(kSilence);
  RWKV_ASSIGN_OR_RETURN(
      std::unique_ptr<worker::DeviceLinks> links,
      worker::MakeNcclLinks(
          nccl, absl::StrCat(bound->identity(), end), [bound] { return bound->MakeCurrent(); }, limits));
  End side(std::move(gpu), std::move(links), end == "send");
  RWKV_RETURN_IF_ERROR(side.Init());
  for (std::string order; std::getline(std::cin, order);) {
    const absl::StatusOr<std::string> answer = side.Obey(order);
    std::cout << (answer.ok() ? *answer : absl::StrCat("failed: ", answer.status().ToString())) << std::endl;
  }
  return absl::OkStatus();
}

absl::Status Pair(const std::string& device, const std::string& program) {
  signal(SIGPIPE, SIG_IGN);
  int version = 0;
  std::string other = device;
  if (!IsEmulated(device)) {
    const absl::StatusOr<worker::nccl::Nccl> nccl = worker::nccl::Load(worker::nccl::kLibrary);
    if (!nccl.ok()) {
      std::cout << "NOT RUN: " << nccl.status().message() << std::endl;
      return absl::OkStatus();
    }
    (void)nccl->get_version(&version);
    int count = 0;
    (void)RuntimeOf(device).get_device_count(&count);
    if (count > 1 && device == "cuda:0") other = "cuda:1";
  }
  Child receiver(program, device, "receive");
  Child sender(program, other, "send");
  RWKV_RETURN_IF_ERROR(receiver.Start());
  RWKV_RETURN_IF_ERROR(sender.Start());
  const double begin = Now();
  RWKV_RETURN_IF_ERROR(Join(sender, receiver));
  const double joined = Now();
  RWKV_ASSIGN_OR_RETURN(const double us, MoveRows(sender, receiver, IsEmulated(device) ? 100 : 2000));
  std::cout << absl::StrFormat(
                   "{\"pair\": \"rows\", \"nccl\": %d, \"devices\": \"%s, %s\", \"rows\": %d, \"bytes\": %d, "
                   "\"join_ms\": %.1f, \"us\": %.2f}",
                   version, other, device, kRows, 2 * 4 * kRows * kShape.width, (joined - begin) * 1e3, us)
            << std::endl;
  RWKV_RETURN_IF_ERROR(Disturb(sender, receiver, SIGKILL, "killed"));
  RWKV_RETURN_IF_ERROR(Disturb(sender, receiver, SIGSTOP, "silent"));
  RWKV_RETURN_IF_ERROR(sender.Finish());
  return receiver.Finish();
}

}  // namespace rwkv::gpu
