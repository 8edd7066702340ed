#include "tests/testing/test_servers.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pwd.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/wait_until.h"

namespace rwkv::testing {
namespace {

constexpr absl::Duration kLimit = absl::Seconds(60);
constexpr char kPostgres[] = "/usr/lib/postgresql/15/bin/";

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address));
  socklen_t size = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  close(fd);
  return ntohs(address.sin_port);
}

absl::StatusOr<std::string> NewFolder(const char* kind) {
  // Not in the test's own: a PostgreSQL that root starts runs as another user, who must reach it.
  std::string folder = absl::StrCat("/tmp/rwkv-", kind, "-XXXXXX");
  if (mkdtemp(folder.data()) == nullptr)
    return absl::UnavailableError(absl::StrCat(folder, ": ", std::strerror(errno)));
  return folder;
}

// Before a command, if this is root: PostgreSQL refuses to run as that.
std::vector<std::string> AsPostgres(std::vector<std::string> command) {
  if (getuid() != 0) return command;
  std::vector<std::string> whole = {"/usr/bin/setpriv", "--pdeathsig", "KILL",     "--reuid",
                                    "postgres",         "--regid",     "postgres", "--clear-groups"};
  whole.insert(whole.end(), command.begin(), command.end());
  return whole;
}

absl::Status RunToEnd(const std::vector<std::string>& command, const std::string& log) {
  std::string line;
  for (const std::string& word : command) absl::StrAppend(&line, "'", word, "' ");
  const int status = std::system(absl::StrCat(line, ">>'", log, "' 2>&1 </dev/null").c_str());
  if (status == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(command[0], " ended with ", status));
}

}  // namespace

void TestServer::Spawn(const std::vector<std::string>& command) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const std::string log = folder_ + "/log";
  pid_ = fork();
  if (pid_ != 0) return;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int fd = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  dup2(fd, 1);
  dup2(fd, 2);
  dup2(open("/dev/null", O_RDONLY), 0);
  if (chdir("/") != 0) _exit(126);
  execv(argv[0], argv.data());
  _exit(127);
}

std::string TestServer::LogTail() const {
  std::ifstream in(folder_ + "/log");
  std::stringstream content;
  content << in.rdbuf();
  const std::string text = content.str();
  return text.size() > 2000 ? text.substr(text.size() - 2000) : text;
}

absl::Status TestServer::WaitUntilListening() const {
  bool listening = false;
  const auto listens_or_ended = [&] {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in address = Loopback(port_);
    listening = connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
    close(fd);
    return listening || waitpid(pid_, nullptr, WNOHANG) != 0;
  };
  if (WaitUntil(listens_or_ended, kLimit) && listening) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the server in ", folder_, " does not listen:\n", LogTail()));
}

void TestServer::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

absl::Status TestServer::Restart() {
  Kill();
  absl::Status status;
  // What a killed server left may take a moment to go.
  const auto started = [&] {
    status = Start();
    if (!status.ok()) pid_ = -1;
    return status.ok();
  };
  (void)WaitUntil(started, kLimit);
  return status;
}

void TestServer::Freeze() { kill(pid_, SIGSTOP); }
void TestServer::Thaw() { kill(pid_, SIGCONT); }

absl::StatusOr<std::unique_ptr<PostgresServer>> PostgresServer::Launch() {
  if (access(absl::StrCat(kPostgres, "postgres").c_str(), X_OK) != 0) {
    return absl::FailedPreconditionError(absl::StrCat("no ", kPostgres, "postgres: install postgresql-15"));
  }
  std::unique_ptr<PostgresServer> server(new PostgresServer());
  RWKV_ASSIGN_OR_RETURN(server->folder_, NewFolder("postgres"));
  server->port_ = FreePort();
  std::ofstream(server->password_file()) << server->password() << "\n";
  if (const passwd* const user = getpwnam("postgres"); getuid() == 0) {
    if (user == nullptr) return absl::FailedPreconditionError("there is no user postgres: install postgresql-15");
    if (chown(server->folder_.c_str(), user->pw_uid, user->pw_gid) != 0) return absl::InternalError("chown");
  }
  chmod(server->folder_.c_str(), 0755);
  const absl::Status made =
      RunToEnd(AsPostgres({absl::StrCat(kPostgres, "initdb"), "-D", server->folder_ + "/data", "-U", "test",
                           "--auth=scram-sha-256", "--pwfile=" + server->password_file(), "--encoding=UTF8",
                           "--locale=C", "--no-sync", "--no-instructions"}),
               server->folder_ + "/log");
  if (!made.ok()) return absl::InternalError(absl::StrCat(made.message(), ":\n", server->LogTail()));
  RWKV_RETURN_IF_ERROR(server->Start());
  return server;
}

absl::Status PostgresServer::Start() {
  std::filesystem::remove(folder_ + "/data/postmaster.pid");
  Spawn(AsPostgres({absl::StrCat(kPostgres, "postgres"), "-D", folder_ + "/data", "-p", absl::StrCat(port_), "-c",
                    "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c",
                    "dynamic_shared_memory_type=mmap", "-c", "max_connections=200"}));
  return WaitUntilListening();
}

PostgresServer::~PostgresServer() {
  if (pid_ > 0) {
    kill(pid_, SIGCONT);
    kill(pid_, SIGQUIT);
    waitpid(pid_, nullptr, 0);
  }
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void PostgresServer::Shutdown(int signal) {
  if (pid_ <= 0) return;
  kill(pid_, signal);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

std::string PostgresServer::url() const {
  return absl::StrCat("postgres://test@127.0.0.1:", port_, "/postgres?sslmode=disable");
}

absl::StatusOr<std::unique_ptr<S3Server>> S3Server::Launch() {
  std::unique_ptr<S3Server> server(new S3Server());
  RWKV_ASSIGN_OR_RETURN(server->folder_, NewFolder("s3"));
  server->port_ = FreePort();
  std::ofstream(server->credentials_file()) << kAccessKey << "\n" << kSecretKey << "\n";
  std::filesystem::create_directories(server->bucket_folder());
  RWKV_RETURN_IF_ERROR(server->Start());
  return server;
}

absl::Status S3Server::Start() {
  const char* const runfiles = std::getenv("TEST_SRCDIR");
  const char* const workspace = std::getenv("TEST_WORKSPACE");
  if (runfiles == nullptr || workspace == nullptr) return absl::FailedPreconditionError("run by bazel test");
  Spawn({"/usr/bin/python3", absl::StrCat(runfiles, "/", workspace, "/tests/testing/s3_server.py"), folder_ + "/data",
         absl::StrCat(port_), kAccessKey, kSecretKey});
  return WaitUntilListening();
}

S3Server::~S3Server() {
  if (pid_ > 0) kill(pid_, SIGCONT);
  Kill();
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

std::string S3Server::endpoint() const { return absl::StrCat("http://127.0.0.1:", port_); }

namespace {

// Ceph's object gateway, started by the script tools/s3-server: `start DIR PORT`, `restart DIR`, `stop DIR`; process
// ids in DIR/pid.
class GatewayServer final : public AnyS3Server {
 public:
  static absl::StatusOr<std::unique_ptr<AnyS3Server>> Launch(const std::string& script) {
    std::unique_ptr<GatewayServer> server(new GatewayServer(script));
    RWKV_ASSIGN_OR_RETURN(server->folder_, NewFolder("gateway"));
    server->StopWithThisProcess();
    RWKV_RETURN_IF_ERROR(server->Start());
    return server;
  }
  ~GatewayServer() override {
    Thaw();
    if (keeper_ != nullptr) pclose(keeper_);  // It stops the server.
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  std::string endpoint() const override { return endpoint_; }
  std::string bucket() const override { return bucket_; }
  std::string credentials_file() const override { return folder_ + "/credentials"; }
  void Kill() override {
    Signal(SIGKILL);
    (void)WaitUntil([this] { return kill(Pid(), 0) != 0; }, kLimit);
  }
  absl::Status Restart() override { return RunScript("restart"); }
  void Freeze() override { Signal(SIGSTOP); }
  void Thaw() override { Signal(SIGCONT); }

 private:
  explicit GatewayServer(std::string script) : script_(std::move(script)) {}

  absl::Status Start() override { return RunScript("start"); }

  absl::Status RunScript(const std::string& verb) {
    const std::string command = absl::StrCat("'", script_, "' ", verb, " '", folder_, "/server' ",
                                             verb == "start" ? "0" : "", " 2>>'", folder_, "/log' </dev/null");
    std::FILE* const pipe = popen(command.c_str(), "re");
    if (pipe == nullptr) return absl::ErrnoToStatus(errno, command);
    std::string said;
    for (int c = 0; (c = std::fgetc(pipe)) != EOF;) said.push_back(static_cast<char>(c));
    if (pclose(pipe) != 0) return absl::UnavailableError(absl::StrCat(command, " failed:\n", LogTail()));
    std::map<std::string, std::string> exported;  // "export NAME=VALUE NAME=VALUE ..."
    for (const absl::string_view word : absl::StrSplit(said, absl::ByAnyChar(" \n"))) {
      const std::pair<std::string, std::string> pair = absl::StrSplit(word, absl::MaxSplits('=', 1));
      exported[pair.first] = pair.second;
    }
    endpoint_ = exported["S3_ENDPOINT"];
    bucket_ = exported["S3_BUCKET"];
    std::ofstream(credentials_file()) << exported["S3_ACCESS_KEY"] << "\n" << exported["S3_SECRET_KEY"] << "\n";
    if (endpoint_.empty()) return absl::UnavailableError(absl::StrCat(command, " names no endpoint: ", said));
    return absl::OkStatus();
  }

  // Its processes are no children of ours: a shell that waits for our end stops them, however we end.
  void StopWithThisProcess() {
    keeper_ = popen(
        absl::StrCat("trap '' INT TERM HUP; cat >/dev/null; '", script_, "' stop '", folder_, "/server' 2>/dev/null")
            .c_str(),
        "we");
  }

  pid_t Pid() const {
    std::ifstream in(folder_ + "/server/pid/rgw");
    pid_t pid = -1;
    in >> pid;
    return pid;
  }
  // To the gateway: objects and their index stay.
  void Signal(int signal) const {
    if (const pid_t pid = Pid(); pid > 1) kill(pid, signal);
  }

  const std::string script_;
  std::FILE* keeper_ = nullptr;
  std::string endpoint_, bucket_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<AnyS3Server>> LaunchS3() {
  const char* const shared = std::getenv("RWKV_SHARED");
  const std::string script = absl::StrCat(shared == nullptr ? "" : shared, "/tools/s3-server");
  if (shared != nullptr && access(script.c_str(), X_OK) == 0) {
    absl::StatusOr<std::unique_ptr<AnyS3Server>> gateway = GatewayServer::Launch(script);
    if (gateway.ok() || !absl::StrContains(gateway.status().message(), "not installed")) return gateway;
  }
  std::fprintf(stderr, "no tools/s3-server in RWKV_SHARED, or not installed: S3 is tests/testing/s3_server.py\n");
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<S3Server> server, S3Server::Launch());
  return std::unique_ptr<AnyS3Server>(std::move(server));
}

}  // namespace rwkv::testing
