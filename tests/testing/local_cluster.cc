#include "tests/testing/local_cluster.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/cluster.grpc.pb.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/common/security/security.h"
#include "tests/testing/files.h"
#include "tests/testing/wait_until.h"

namespace rwkv::testing {
namespace {

constexpr absl::Duration kDrainTimeout = absl::Seconds(30);
constexpr size_t kLogTailBytes = 4000;

absl::Status MakeDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return absl::OkStatus();
  return absl::ErrnoToStatus(errno, absl::StrCat("mkdir ", path));
}

// Runs `arguments` with its output appended to `log_path`. The kernel kills it when the calling thread ends.
absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& arguments, const std::string& log_path) {
  // Everything that allocates comes before fork(): between it and exec only system calls are safe in a process with
  // threads.
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const int log = open(log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (log < 0) return absl::ErrnoToStatus(errno, absl::StrCat("open ", log_path));
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  sigset_t no_signals;
  sigemptyset(&no_signals);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);  // The parent died before the line above.
    sigprocmask(SIG_SETMASK, &no_signals, nullptr);
    dup2(null, STDIN_FILENO);
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  const int error = errno;
  close(log);
  close(null);
  if (pid < 0) return absl::ErrnoToStatus(error, "fork");
  return pid;
}

// "grpc=HOST:PORT\n..." -> HOST:PORT.
std::string PortFileEntry(const std::string& content, const std::string& key) {
  for (absl::string_view line : absl::StrSplit(content, '\n')) {
    if (absl::ConsumePrefix(&line, absl::StrCat(key, "="))) return std::string(line);
  }
  return "";
}

std::string DescribeExit(int wait_status) {
  if (WIFSIGNALED(wait_status)) return absl::StrCat("was killed by signal ", WTERMSIG(wait_status));
  return absl::StrCat("ended with status ", WEXITSTATUS(wait_status));
}

}  // namespace

std::string Runfile(const std::string& path) {
  const char* const source_directory = getenv("TEST_SRCDIR");
  const char* const workspace = getenv("TEST_WORKSPACE");
  if (source_directory == nullptr || workspace == nullptr) return path;
  return absl::StrCat(source_directory, "/", workspace, "/", path);
}

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::StartWithoutWaiting(const Options& options) {
  std::unique_ptr<LocalCluster> cluster(new LocalCluster(options));
  RWKV_RETURN_IF_ERROR(cluster->Prepare());
  RWKV_RETURN_IF_ERROR(cluster->StartAll());
  return cluster;
}

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(const Options& options) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<LocalCluster> cluster, StartWithoutWaiting(options));
  RWKV_RETURN_IF_ERROR(cluster->WaitUntilServing());
  return cluster;
}

LocalCluster::~LocalCluster() {
  if (!::testing::Test::HasFailure()) {
    const absl::Status status = Stop();
    if (!status.ok()) ADD_FAILURE() << "the cluster did not stop well: " << status;
  }
  const absl::Status status = KillAll();
  if (!status.ok()) ADD_FAILURE() << status;
  if (::testing::Test::HasFailure()) {
    for (const std::string& name : process_names()) std::fprintf(stderr, "%s", LogTail(name).c_str());
  }
}

std::vector<std::string> LocalCluster::StagesOfWorkers() const {
  std::vector<std::string> stages;
  const auto add = [&stages](int stage, int of) { stages.push_back(absl::StrCat(stage, "/", of)); };
  for (int i = 0; i < options_.pipelines * options_.stages; ++i) add(i % options_.stages, options_.stages);
  for (const int spare : options_.spares) add(spare, options_.stages);
  for (int i = 0; i < options_.stages_of_another; ++i) add(i, options_.stages_of_another);
  return stages;
}

absl::Status LocalCluster::Prepare() {
  if (options_.directory.empty()) {
    std::string path = absl::StrCat(::testing::TempDir(), "/cluster_XXXXXX");
    if (mkdtemp(path.data()) == nullptr) return absl::ErrnoToStatus(errno, path);
    options_.directory = path;
  }
  RWKV_RETURN_IF_ERROR(MakeDirectory(options_.directory));
  RWKV_RETURN_IF_ERROR(MakeDirectory(options_.directory + "/state"));
  bool has_folder = true;
  for (const std::string& flag : options_.state_store_flags) has_folder &= !absl::StartsWith(flag, "--catalog=");
  for (int i = 0; i < options_.stores; ++i) {
    Process& store = processes_[absl::StrCat("state_store-", i)];
    store.binary = "services/state_store/state_store";
    store.flags = options_.state_store_flags;
    if (has_folder) store.flags.push_back(absl::StrCat("--data_dir=", options_.directory, "/state"));
  }
  const std::vector<std::string> stages = StagesOfWorkers();
  for (size_t i = 0; i < stages.size(); ++i) {
    Process& worker = processes_[absl::StrCat("worker-", i)];
    worker.binary = options_.worker_binary;
    worker.flags = options_.worker_flags;
    worker.flags.push_back(absl::StrCat("--model=", options_.model));
    worker.flags.push_back(absl::StrCat("--stage=", stages[i]));
  }
  for (int i = 0; i < options_.routers; ++i) {
    processes_[absl::StrCat("router-", i)].binary = "services/router/router";
  }
  if (options_.tls) {
    RWKV_RETURN_IF_ERROR(MakeDirectory(options_.directory + "/tls"));
    authority_ = std::make_unique<TestAuthority>("local cluster");
    files("operator").Write(authority_->IssueRole("operator"));
    files("operator").WriteAuthorities(authority_->certificate());
    for (const std::string& name : process_names()) {
      TlsFolder folder = files(name);
      // "state_store-0" has the role "store".
      const std::string kind = name.substr(0, name.rfind('-'));
      folder.Write(authority_->IssueRole(kind == "state_store" ? "store" : kind));
      folder.WriteAuthorities(authority_->certificate());
    }
  }
  return absl::OkStatus();
}

absl::Status LocalCluster::StartAll() {
  for (const std::string& name : process_names()) {
    if (absl::StartsWith(name, "router-")) {
      // Only now are the addresses known.
      Process& router = processes_[name];
      router.flags = {absl::StrCat("--workers=", Addresses("worker")),
                      absl::StrCat("--state_store=", Addresses("state_store")), "--allow_logits"};
      router.flags.insert(router.flags.end(), options_.router_flags.begin(), options_.router_flags.end());
    }
    if (absl::StartsWith(name, "worker-")) {
      processes_[name].flags.push_back(absl::StrCat("--state_store=", Addresses("state_store")));
    }
    RWKV_RETURN_IF_ERROR(Restart(name));
  }
  return absl::OkStatus();
}

std::vector<std::string> LocalCluster::Names(const std::string& kind) const {
  const int workers = static_cast<int>(StagesOfWorkers().size());
  const int count = kind == "router" ? options_.routers : kind == "worker" ? workers : options_.stores;
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(absl::StrCat(kind, "-", i));
  return names;
}

std::string LocalCluster::Addresses(const std::string& kind) const {
  std::vector<std::string> addresses;
  for (const std::string& name : Names(kind)) addresses.push_back(address(name));
  return absl::StrJoin(addresses, ",");
}

std::vector<std::string> LocalCluster::process_names() const {
  std::vector<std::string> names;
  for (const char* const kind : {"state_store", "worker", "router"}) {
    const std::vector<std::string> its = Names(kind);
    names.insert(names.end(), its.begin(), its.end());
  }
  return names;
}

TlsFolder LocalCluster::files(const std::string& name) const {
  return TlsFolder(absl::StrCat(options_.directory, "/tls/", name));
}

std::shared_ptr<grpc::Channel> LocalCluster::Channel(const std::string& process) const {
  common::ChannelOptions options;
  if (options_.tls) {
    common::ClientSecurityOptions security;
    const TlsFolder folder = files("operator");
    security.authorities = folder.authorities();
    security.certificate = folder.certificate();
    security.key = folder.key();
    const absl::StatusOr<common::ClientCredentials> made = common::MakeClientCredentials(security);
    if (made.ok()) {
      options.credentials = made->credentials;
    } else {
      ADD_FAILURE() << made.status();
    }
  }
  return common::MakeChannel(address(process), options);
}

absl::Status LocalCluster::BeginRestart(const std::string& name, const std::vector<std::string>& extra_flags) {
  Process& process = processes_.at(name);
  if (process.pid >= 0) return absl::FailedPreconditionError(absl::StrCat(name, " is running"));
  std::remove(PortFile(name).c_str());
  std::vector<std::string> arguments = {
      Runfile(process.binary), absl::StrCat("--name=", name), absl::StrCat("--port_file=", PortFile(name)),
      absl::StrCat("--listen=", process.grpc_address), absl::StrCat("--metrics_listen=", process.metrics_address)};
  arguments.insert(arguments.end(), process.flags.begin(), process.flags.end());
  if (options_.tls) {
    TlsFolder folder = files(name);
    arguments.push_back("--tls_certificate=" + folder.certificate());
    arguments.push_back("--tls_key=" + folder.key());
    arguments.push_back("--tls_authorities=" + folder.authorities());
  }
  arguments.insert(arguments.end(), extra_flags.begin(), extra_flags.end());
  RWKV_ASSIGN_OR_RETURN(process.pid, Spawn(arguments, LogPath(name)));
  return absl::OkStatus();
}

absl::Status LocalCluster::Restart(const std::string& name, const std::vector<std::string>& extra_flags) {
  RWKV_RETURN_IF_ERROR(BeginRestart(name, extra_flags));
  Process& process = processes_.at(name);
  std::string ports;
  int wait_status = -1;
  const auto listens_or_ended = [&] {
    wait_status = WaitForExit(process, absl::InfinitePast());
    return wait_status >= 0 || !(ports = ReadFile(PortFile(name))).empty();
  };
  const bool in_time = WaitUntil(listens_or_ended, options_.start_timeout);
  if (wait_status >= 0) {
    return absl::UnavailableError(
        absl::StrCat(name, " ", DescribeExit(wait_status), " while starting:\n", LogTail(name)));
  }
  if (!in_time) return absl::DeadlineExceededError(absl::StrCat(name, " does not listen:\n", LogTail(name)));
  process.grpc_address = PortFileEntry(ports, "grpc");
  process.metrics_address = PortFileEntry(ports, "metrics");
  return absl::OkStatus();
}

absl::StatusOr<int> LocalCluster::WaitUntilGone(const std::string& name) {
  const int wait_status = WaitForExit(processes_.at(name), absl::Now() + options_.start_timeout);
  if (wait_status >= 0) return wait_status;
  return absl::DeadlineExceededError(absl::StrCat(name, " does not end:\n", LogTail(name)));
}

absl::Status LocalCluster::RestartAll() {
  for (const std::string& name : process_names()) {
    if (processes_.at(name).pid < 0) RWKV_RETURN_IF_ERROR(Restart(name));
  }
  return absl::OkStatus();
}

int LocalCluster::WaitForExit(Process& process, absl::Time deadline) {
  int wait_status = 0;
  const auto ended = [&] { return waitpid(process.pid, &wait_status, WNOHANG) == process.pid; };
  if (!WaitUntil(ended, deadline - absl::Now())) return -1;
  process.pid = -1;
  return wait_status;
}

absl::Status LocalCluster::Kill(const std::string& name) {
  Process& process = processes_.at(name);
  if (process.pid < 0) return absl::OkStatus();
  kill(process.pid, SIGKILL);
  if (WaitForExit(process, absl::Now() + kDrainTimeout) < 0) {
    return absl::DeadlineExceededError(absl::StrCat(name, " survives SIGKILL"));
  }
  return absl::OkStatus();
}

absl::Status LocalCluster::KillAll() {
  for (auto& [name, process] : processes_) {
    if (process.pid >= 0) kill(process.pid, SIGKILL);
  }
  absl::Status first;
  for (const auto& [name, process] : processes_) first.Update(Kill(name));
  return first;
}

absl::Status LocalCluster::BeginTerminate(const std::string& name) {
  if (kill(processes_.at(name).pid, SIGTERM) != 0) return absl::ErrnoToStatus(errno, name);
  return absl::OkStatus();
}

absl::Status LocalCluster::Terminate(const std::string& name) {
  Process& process = processes_.at(name);
  if (process.pid < 0) return absl::OkStatus();
  kill(process.pid, SIGTERM);
  kill(process.pid, SIGCONT);  // A frozen process could not see it.
  const int wait_status = WaitForExit(process, absl::Now() + kDrainTimeout);
  if (wait_status < 0) {
    absl::Status status =
        absl::DeadlineExceededError(absl::StrCat(name, " does not stop after SIGTERM:\n", LogTail(name)));
    status.Update(Kill(name));
    return status;
  }
  if (wait_status != 0) {
    return absl::InternalError(absl::StrCat(name, " ", DescribeExit(wait_status), ":\n", LogTail(name)));
  }
  return absl::OkStatus();
}

absl::Status LocalCluster::Stop() {
  const std::vector<std::string> names = process_names();
  absl::Status first;
  for (auto name = names.rbegin(); name != names.rend(); ++name) first.Update(Terminate(*name));
  return first;
}

absl::Status LocalCluster::Freeze(const std::string& name) {
  if (kill(processes_.at(name).pid, SIGSTOP) != 0) return absl::ErrnoToStatus(errno, name);
  return absl::OkStatus();
}

absl::Status LocalCluster::Thaw(const std::string& name) {
  if (kill(processes_.at(name).pid, SIGCONT) != 0) return absl::ErrnoToStatus(errno, name);
  return absl::OkStatus();
}

absl::Status LocalCluster::WaitUntilServing() {
  const auto stub = v1::Cluster::NewStub(Channel("router-0"));
  absl::Status broken;
  std::string last = "nothing";
  const auto serves_or_broken = [&] {
    for (const std::string& name : process_names()) {
      Process& process = processes_.at(name);
      if (process.pid < 0) broken = absl::FailedPreconditionError(absl::StrCat(name, " is not running"));
      if (!broken.ok()) return true;
      const int wait_status = WaitForExit(process, absl::InfinitePast());
      if (wait_status < 0) continue;
      broken = absl::UnavailableError(absl::StrCat(name, " ", DescribeExit(wait_status), ":\n", LogTail(name)));
      return true;
    }
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
    v1::GetStatusResponse response;
    const grpc::Status status = stub->GetStatus(&context, {}, &response);
    last = status.ok() ? absl::StrCat(response.pipeline_state(), ", with ", response.lanes_size(), " pipelines driven")
                       : common::FromGrpcStatus(status).ToString();
    const bool serves = options_.routers > 1 || response.pipeline_state() == "serving";
    return status.ok() && serves && response.lanes_size() == pipelines();
  };
  if (WaitUntil(serves_or_broken, options_.start_timeout)) return broken;
  return absl::DeadlineExceededError(absl::StrCat("the pipeline does not serve; the router says: ", last));
}

std::string LocalCluster::LogPath(const std::string& name) const {
  return absl::StrCat(options_.directory, "/", name, ".log");
}

std::string LocalCluster::PortFile(const std::string& name) const {
  return absl::StrCat(options_.directory, "/", name, ".ports");
}

std::string LocalCluster::Log(const std::string& name) const { return ReadFile(LogPath(name)); }

std::string LocalCluster::LogTail(const std::string& name) const {
  std::string log = Log(name);
  if (log.size() > kLogTailBytes) log = absl::StrCat("...", log.substr(log.size() - kLogTailBytes));
  return absl::StrCat("---- ", name, " ----\n", log, "\n");
}

}  // namespace rwkv::testing
