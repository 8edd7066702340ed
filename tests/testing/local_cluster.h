// A whole cluster of real processes for a test: a state store, workers, routers, each its own process on a free port,
// which a test may kill and restart. Binaries come out of the test's runfiles.
#pragma once

#include <sys/types.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "tests/testing/certificates.h"

namespace testing {}

namespace rwkv::testing {

using namespace ::testing;  // So that testing::HasSubstr, said inside namespace rwkv, still means GoogleMock's.

// Processes are called "state_store-0", "worker-0" ... (of S stages, worker-I is stage I % S; spares come last), and
// "router-0" ... Use it from one thread, which must outlive it:
// when that thread ends, also by a crash, the kernel kills the processes.
class LocalCluster {
 public:
  struct Options {
    std::string model;  // Required: the checkpoint.
    int stages = 2;
    int pipelines = 1;
    std::vector<int> spares;    // A worker more for each of these stages.
    int stages_of_another = 0;  // A pipeline more, of another cut; its workers come last. 0: none.
    int routers = 1;
    // Several share what their flags name (--catalog, --records, ...).
    int stores = 1;
    // Holds the store's data, logs and port files; a second cluster on the same one finds the sessions of the first.
    // Empty: a fresh folder in the test's own.
    std::string directory;
    // In the runfiles. Another one must be among the test's data.
    std::string worker_binary = "services/worker/worker";
    // Flags besides those every start needs, for example "--slots=4". A store with a --catalog has no folder.
    std::vector<std::string> state_store_flags;
    std::vector<std::string> worker_flags;
    std::vector<std::string> router_flags;
    // Everything is encrypted, with certificates in DIRECTORY/tls/NAME and a `role` each. Calls of Channel() are an
    // operator's.
    bool tls = false;
    // How long a process may take to listen, or the pipeline to serve. Generous: sanitizers on a busy machine are slow.
    absl::Duration start_timeout = absl::Seconds(60);
  };

  // Starts all processes and waits until the pipeline serves. An error holds the end of the log of who died.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> Start(const Options& options);

  // Start() without the wait for the pipeline: for clusters that must not serve. Every process listens.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> StartWithoutWaiting(const Options& options);

  // Stop(); if that fails the test does, with the log. After a test failure the processes are just killed.
  ~LocalCluster();

  LocalCluster(const LocalCluster&) = delete;
  LocalCluster& operator=(const LocalCluster&) = delete;

  // "HOST:PORT" of a process; stays the same over restarts.
  const std::string& address(const std::string& name) const { return processes_.at(name).grpc_address; }
  const std::string& metrics_address(const std::string& name) const { return processes_.at(name).metrics_address; }
  std::string router_address() const { return address("router-0"); }
  pid_t pid(const std::string& name) const { return processes_.at(name).pid; }
  const std::string& directory() const { return options_.directory; }
  // "router-0", "router-1", ...: all of a kind ("router", "worker", "state_store").
  std::vector<std::string> Names(const std::string& kind) const;
  // All names, in the order in which they start.
  std::vector<std::string> process_names() const;

  // With tls: signs the certificates; files(NAME), NAME a process or "operator".
  TestAuthority& authority() const { return *authority_; }
  TlsFolder files(const std::string& name) const;

  // A new channel to a process.
  std::shared_ptr<grpc::Channel> Channel(const std::string& name) const;

  // SIGKILL, and waits until it is gone. OK if it was gone already.
  absl::Status Kill(const std::string& name);
  // All at once, as when a machine loses power.
  absl::Status KillAll();
  // SIGTERM, and waits for its end. kInternal: it did not end well (status not 0, as when a sanitizer found something),
  // with the end of its log. kDeadlineExceeded: it did not drain in time, and was killed.
  absl::Status Terminate(const std::string& name);
  // Only the SIGTERM; Terminate() waits for what follows.
  absl::Status BeginTerminate(const std::string& name);
  // Terminates router, workers, store in this order. Reports the first error.
  absl::Status Stop();
  // Starts a process that is gone again, on the same port, and waits until it listens.
  // `extra_flags` are for this start only.
  absl::Status Restart(const std::string& name, const std::vector<std::string>& extra_flags = {});
  // Only the start.
  absl::Status BeginRestart(const std::string& name, const std::vector<std::string>& extra_flags = {});
  // Waits until a process that ends by itself is gone; its wait status. kDeadlineExceeded: it is still there.
  absl::StatusOr<int> WaitUntilGone(const std::string& name);
  // Restarts all that are gone.
  absl::Status RestartAll();
  // SIGSTOP and SIGCONT: alive, but silent.
  absl::Status Freeze(const std::string& name);
  absl::Status Thaw(const std::string& name);

  // Until the first router says that all pipelines are driven, and one by itself. kDeadlineExceeded after
  // start_timeout, with what it said last.
  absl::Status WaitUntilServing();

  // Everything the process has written to its log, over all its starts.
  std::string Log(const std::string& name) const;

 private:
  struct Process {
    std::string binary;              // In the runfiles.
    std::vector<std::string> flags;  // All but addresses, name and port file.
    pid_t pid = -1;                  // -1: not running.
    std::string grpc_address = "127.0.0.1:0";
    std::string metrics_address = "127.0.0.1:0";
  };

  explicit LocalCluster(const Options& options) : options_(options) {}

  // Of all of a kind, as --workers and --state_store want them.
  std::string Addresses(const std::string& kind) const;
  int pipelines() const { return options_.pipelines + (options_.stages_of_another > 0 ? 1 : 0); }
  // "2/3" of each worker, in order.
  std::vector<std::string> StagesOfWorkers() const;
  absl::Status Prepare();
  absl::Status StartAll();
  // Waits for the end of a process; -1: still running at the deadline; else its wait status.
  int WaitForExit(Process& process, absl::Time deadline);
  std::string LogPath(const std::string& name) const;
  // Where a process writes its addresses once it listens.
  std::string PortFile(const std::string& name) const;
  std::string LogTail(const std::string& name) const;

  Options options_;
  std::map<std::string, Process> processes_;
  std::unique_ptr<TestAuthority> authority_;  // Null: no TLS.
};

// The absolute path of a file in the runfiles: Runfile("services/router/router").
std::string Runfile(const std::string& path);

}  // namespace rwkv::testing
