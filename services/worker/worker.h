// A whole worker: model, engine, links and services behind one server. What main() runs, and what tests start in their
// own process.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/device.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/security/security.h"
#include "services/common/tracing/tracer.h"
#include "services/worker/link/nccl.h"

namespace rwkv::worker {

class Worker {
 public:
  struct Options {
    std::string name = "worker-0";
    std::string listen = "127.0.0.1:0";
    std::string metrics_listen = "127.0.0.1:0";  // Empty: no endpoint.
    std::string port_file;                       // Empty: none.
    std::string health_listen;                   // Empty: none. services/common/rpc_server.h
    common::Security::Options security;          // No files: no encryption.
    common::Tracer::Options tracing;             // No endpoint: none.
    std::vector<std::string> state_store;        // "HOST:PORT"; none: no states are loaded or saved.
    std::string model;                           // Path of the checkpoint. Required.
    std::string lora;                            // A LoRA adapter to merge into it; empty: none.
    double lora_alpha = 0;                       // What it was trained with, > 0; with lora only, and then required.
    std::vector<std::string> initial_states;     // "NAME=FILE": what sessions may begin with; model/tuned_states.h.
    // Which layers: one of the two, or neither for all.
    std::string stage;                  // "I/S"
    std::string layers;                 // "BEGIN:END"
    int slots = 64;                     // 1 .. 65,536
    int max_batch_tokens = 128;         // 1 .. 8,192
    float group_norm_epsilon = 64e-5f;  // In (0, 1].
    bool ignore_extra_tensors = false;
    int deep_embed_context = 4096;                    // 1 .. 1,048,576 tokens; RWKV-7b only.
    std::string device = "auto";                      // kernels/dispatch/open_device.h
    int threads = 0;                                  // 0 .. 1,024; kernels/dispatch/open_device.h
    std::string link = "auto";                        // How rows reach the next stage: "auto", "grpc" or "nccl".
    absl::Duration link_timeout = absl::Seconds(30);  // For a step; with nccl. In (0, 30 min].
    int64_t max_snapshot_bytes_in_flight = int64_t{256} << 20;
    int64_t kept_state_bytes = int64_t{64} << 20;  // 0: none are kept.
    absl::Duration drain_timeout = absl::Seconds(10);
  };

  // What the process brings; tests bring something else.
  struct Platform {
    // As kernels::OpenDevice().
    std::function<absl::StatusOr<std::unique_ptr<kernels::Device>>(const std::string& name, int threads)> open_device;
    std::function<absl::StatusOr<nccl::Nccl>()> load_nccl;  // Called for devices that are GPUs.
  };
  static Platform MachinesOwn();

  // Loads the model, warms up and serves; health is SERVING when it returns.
  //   kInvalidArgument: an option, or the model file; named. kNotFound: no such file. kUnavailable: a port in use.
  //   kResourceExhausted: no memory for the slots.
  static absl::StatusOr<std::unique_ptr<Worker>> Start(const Options& options,
                                                       const Platform& platform = MachinesOwn());

  // Shuts down at once.
  virtual ~Worker() = default;

  virtual const std::string& address() const = 0;
  virtual std::string metrics_address() const = 0;
  virtual const v1::DescribeResponse& description() const = 0;

  // Waits for SIGTERM, then drains: NOT_SERVING, no new epoch, snapshots that were begun reach the store.
  virtual absl::Status ServeUntilSignal() = 0;
};

}  // namespace rwkv::worker
