#include "services/common/metrics.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"
#include "services/common/logging.h"

namespace rwkv::common {
namespace {

// prometheus-cpp answers misuse (a bad name, one name as two kinds) with exceptions; that is a bug of the caller.
template <typename Make>
auto& MakeOrDie(const std::string& name, Make make) {
  try {
    return make();
  } catch (const std::exception& e) {
    LogError("metric_misused", {{"metric", name}, {"error", e.what()}});
    std::abort();
  }
}

// Connects to `address` and hangs up. Only for numeric IPv4 hosts; the caller can live without.
void Poke(const std::string& address) {
  const absl::StatusOr<HostPort> host_port = ParseHostPort(address);
  sockaddr_in peer = {};
  peer.sin_family = AF_INET;
  if (!host_port.ok() || inet_pton(AF_INET, host_port->host.c_str(), &peer.sin_addr) != 1) return;
  peer.sin_port = htons(host_port->port);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return;
  (void)!connect(fd, reinterpret_cast<const sockaddr*>(&peer), sizeof(peer));
  close(fd);
}

}  // namespace

Metrics::Metrics(const Labels& constant_labels)
    : constant_labels_(constant_labels), registry_(std::make_shared<prometheus::Registry>()) {}

Metrics::~Metrics() {
  if (exposer_ == nullptr) return;
  // civetweb's accept loop looks at its stop flag only every two seconds or when somebody connects, so we connect until
  // it is gone; otherwise every process would take two seconds longer to stop.
  absl::Notification stopped;
  std::thread poker([&] {
    do {
      Poke(address_);
    } while (!stopped.WaitForNotificationWithTimeout(absl::Milliseconds(5)));
  });
  exposer_.reset();
  stopped.Notify();
  poker.join();
}

absl::StatusOr<std::unique_ptr<Metrics>> Metrics::Create(absl::string_view listen_address,
                                                         const Labels& constant_labels) {
  std::unique_ptr<Metrics> metrics(new Metrics(constant_labels));
  if (listen_address.empty()) return metrics;
  RWKV_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(listen_address));
  try {
    metrics->exposer_ = std::make_unique<prometheus::Exposer>(FormatHostPort(address));
    metrics->exposer_->RegisterCollectable(metrics->registry_);
    const std::vector<int> ports = metrics->exposer_->GetListeningPorts();
    if (ports.empty()) throw std::runtime_error("no listening port");
    address.port = static_cast<uint16_t>(ports.front());
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("cannot serve metrics on ", listen_address,
                                               " (in use, or no address of this machine): ", e.what()));
  }
  metrics->address_ = FormatHostPort(address);
  return metrics;
}

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help, const Labels& labels) {
  return MakeOrDie(name, [&]() -> prometheus::Counter& {
    return prometheus::BuildCounter().Name(name).Help(help).Labels(constant_labels_).Register(*registry_).Add(labels);
  });
}

prometheus::Gauge& Metrics::Gauge(const std::string& name, const std::string& help, const Labels& labels) {
  return MakeOrDie(name, [&]() -> prometheus::Gauge& {
    return prometheus::BuildGauge().Name(name).Help(help).Labels(constant_labels_).Register(*registry_).Add(labels);
  });
}

prometheus::Histogram& Metrics::Histogram(const std::string& name, const std::string& help,
                                          const prometheus::Histogram::BucketBoundaries& buckets,
                                          const Labels& labels) {
  return MakeOrDie(name, [&]() -> prometheus::Histogram& {
    return prometheus::BuildHistogram()
        .Name(name)
        .Help(help)
        .Labels(constant_labels_)
        .Register(*registry_)
        .Add(labels, buckets);
  });
}

prometheus::Histogram::BucketBoundaries Metrics::LatencyBuckets() {
  return {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
}

prometheus::Histogram::BucketBoundaries Metrics::CountBuckets() {
  return {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096};
}

prometheus::Histogram::BucketBoundaries Metrics::ByteBuckets() {
  prometheus::Histogram::BucketBoundaries buckets;
  for (double bytes = 1024; bytes <= 1024.0 * 1024 * 1024; bytes *= 4) buckets.push_back(bytes);
  return buckets;
}

}  // namespace rwkv::common
