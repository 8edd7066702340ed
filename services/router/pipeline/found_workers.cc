#include "services/router/pipeline/found_workers.h"

#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"
#include "services/common/grpc_status.h"

namespace rwkv::router {
namespace {

// Of one file, or of all places together. More are an error, not a slow death.
constexpr size_t kMaxWorkers = 16384;

absl::Status ReadList(const std::string& path, std::set<std::string>* addresses) {
  std::ifstream file(path);
  if (!file) return absl::UnavailableError(absl::StrCat("--workers: cannot read ", path));
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string address(absl::StripAsciiWhitespace(line.substr(0, line.find('#'))));
    if (address.empty()) continue;
    RWKV_RETURN_IF_ERROR(
        common::Annotate(common::ParseHostPort(address).status(), absl::StrCat("--workers: ", path, ":", number)));
    addresses->insert(address);
    if (addresses->size() > kMaxWorkers) return absl::ResourceExhaustedError(absl::StrCat(path, ": too many workers"));
  }
  return absl::OkStatus();
}

absl::Status Resolve(const common::HostPort& name, std::set<std::string>* addresses) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(name.host.c_str(), nullptr, &hints, &found);
  if (error == EAI_NONAME) return absl::OkStatus();  // Nobody there just now.
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat("--workers: cannot resolve ", name.host, ": ", gai_strerror(error)));
  }
  for (const addrinfo* one = found; one != nullptr && addresses->size() <= kMaxWorkers; one = one->ai_next) {
    char host[NI_MAXHOST];
    if (getnameinfo(one->ai_addr, one->ai_addrlen, host, sizeof(host), nullptr, 0, NI_NUMERICHOST) != 0) continue;
    common::HostPort address = name;
    address.host = host;
    addresses->insert(common::FormatHostPort(address));
  }
  freeaddrinfo(found);
  return absl::OkStatus();
}

class FoundWorkers final : public WorkerSource {
 public:
  FoundWorkers(std::set<std::string> addresses, std::vector<std::string> files, std::vector<common::HostPort> names,
               ConnectWorker connect)
      : addresses_(std::move(addresses)),
        files_(std::move(files)),
        names_(std::move(names)),
        connect_(std::move(connect)) {}

  absl::StatusOr<std::vector<std::string>> List() override {
    std::set<std::string> addresses = addresses_;
    for (const std::string& file : files_) RWKV_RETURN_IF_ERROR(ReadList(file, &addresses));
    for (const common::HostPort& name : names_) RWKV_RETURN_IF_ERROR(Resolve(name, &addresses));
    return std::vector<std::string>(addresses.begin(), addresses.end());
  }

  std::unique_ptr<worker::WorkerClient> Connect(const std::string& address) override { return connect_(address); }

 private:
  const std::set<std::string> addresses_;
  const std::vector<std::string> files_;
  const std::vector<common::HostPort> names_;
  const ConnectWorker connect_;
};

class GivenWorkers final : public WorkerSource {
 public:
  explicit GivenWorkers(std::vector<std::unique_ptr<worker::WorkerClient>> workers) {
    for (std::unique_ptr<worker::WorkerClient>& worker : workers) {
      addresses_.push_back(worker->address());
      workers_[addresses_.back()] = std::move(worker);
    }
  }
  absl::StatusOr<std::vector<std::string>> List() override { return addresses_; }
  std::unique_ptr<worker::WorkerClient> Connect(const std::string& address) override {
    return std::move(workers_.at(address));
  }

 private:
  std::vector<std::string> addresses_;
  std::map<std::string, std::unique_ptr<worker::WorkerClient>> workers_;  // Null once they were asked for.
};

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerSource>> FindWorkers(const std::vector<std::string>& places,
                                                          ConnectWorker connect) {
  std::set<std::string> addresses;
  std::vector<std::string> files;
  std::vector<common::HostPort> names;
  for (absl::string_view place : places) {
    if (absl::ConsumePrefix(&place, "file:")) {
      if (place.empty()) return absl::InvalidArgumentError("--workers: file: without a path");
      files.emplace_back(place);
      continue;
    }
    const bool is_name = absl::ConsumePrefix(&place, "dns:");
    absl::StatusOr<common::HostPort> address = common::ParseHostPort(std::string(place));
    if (!address.ok()) return common::Annotate(address.status(), "--workers");
    if (is_name) {
      names.push_back(*std::move(address));
    } else {
      addresses.emplace(place);
    }
  }
  if (places.empty()) return absl::InvalidArgumentError("--workers: no place to look for workers");
  return std::unique_ptr<WorkerSource>(
      std::make_unique<FoundWorkers>(std::move(addresses), std::move(files), std::move(names), std::move(connect)));
}

std::unique_ptr<WorkerSource> TheseWorkers(std::vector<std::unique_ptr<worker::WorkerClient>> workers) {
  return std::make_unique<GivenWorkers>(std::move(workers));
}

}  // namespace rwkv::router
