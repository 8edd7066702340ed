// Where workers are looked for.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::router {

// Used by one thread at a time.
class WorkerSource {
 public:
  virtual ~WorkerSource() = default;
  // The addresses of the workers that should be there now, each once. May block for a while. An error changes nothing:
  // those of before stay.
  virtual absl::StatusOr<std::vector<std::string>> List() = 0;
  // A client for one of these.
  virtual std::unique_ptr<worker::WorkerClient> Connect(const std::string& address) = 0;
};

using ConnectWorker = std::function<std::unique_ptr<worker::WorkerClient>(const std::string& address)>;

// `places`, each one of
//   HOST:PORT        a worker
//   file:PATH        a file with a HOST:PORT a line, read again and again; what follows a # is a comment
//   dns:NAME:PORT    every address that the name resolves to, asked again and again
// kInvalidArgument: none, or one that is none of these.
absl::StatusOr<std::unique_ptr<WorkerSource>> FindWorkers(const std::vector<std::string>& places,
                                                          ConnectWorker connect);

// These and no others.
std::unique_ptr<WorkerSource> TheseWorkers(std::vector<std::unique_ptr<worker::WorkerClient>> workers);

}  // namespace rwkv::router
