#include "services/worker/worker_flags.h"

#include <cstdint>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/time/time.h"
#include "services/common/security/server_flags.h"
#include "services/common/tracing/trace_flags.h"

ABSL_FLAG(std::string, name, "worker-0", "Name of this process in logs, metrics and status.");
ABSL_FLAG(std::string, listen, "127.0.0.1:0", "HOST:PORT of the gRPC services; port 0 picks a free one.");
ABSL_FLAG(std::string, metrics_listen, "127.0.0.1:0",
          "HOST:PORT of the Prometheus endpoint; port 0 picks a free one, empty: none.");
ABSL_FLAG(std::string, port_file, "", "File that gets the addresses once the worker answers; empty: none.");
ABSL_FLAG(std::vector<std::string>, state_store, {},
          "HOST:PORT of the state store; of several all, by commas, as for the router. Empty: nothing is loaded or "
          "saved, and a call that asks for it fails.");
ABSL_FLAG(std::string, model, "", "Checkpoint: .pth, .safetensors, GGUF or rwkv.cpp's .bin. Required.");
ABSL_FLAG(std::string, lora, "", "LoRA adapter (.pth or .safetensors) to merge into the model; empty: none.");
ABSL_FLAG(double, lora_alpha, 0, "The alpha that --lora was trained with, which is not in its file.");
ABSL_FLAG(
    std::vector<std::string>, initial_states, {},
    "NAME=FILE,...: tuned states that sessions may begin with. A file holds blocks.N.att.time_state of every layer, "
    "of which this stage keeps its own: H * N * N * 4 bytes a layer and state. At most 64; none for RWKV-4.");
ABSL_FLAG(std::string, stage, "",
          "I/S: this is stage I of S and takes its even share of the layers. ordinal/S: I is the number at the end of "
          "--name, modulo S, so that the pods of one StatefulSet make whole pipelines.");
ABSL_FLAG(std::string, layers, "", "BEGIN:END: the layers of this stage, instead of --stage. Neither: all layers.");
ABSL_FLAG(int32_t, slots, 64, "Sequences whose state is kept in memory. More cost memory, fewer cost reloads.");
ABSL_FLAG(int32_t, max_batch_tokens, 128, "Rows a step may have. More speed prefill and slow the decodes beside it.");
ABSL_FLAG(bool, ignore_extra_tensors, false,
          "serve a model whose file has tensors that are no part of it; without this they are an error, but for those "
          "that known trainers leave");
ABSL_FLAG(float, group_norm_eps, 64e-5f,
          "Epsilon of the group norm behind the recurrence. The reference's; 1e-5 gives what rwkv.cpp computes of an "
          "RWKV-5.");
ABSL_FLAG(int32_t, deep_embed_context, 4096,
          "RWKV-7b: tokens a sequence may have. Each costs a slot 260 bytes a layer; longer sequences are refused.");
ABSL_FLAG(
    std::string, device, "auto",
    "What computes: auto (a GPU, else the fastest CPU), cuda:0, cpu, cpu/amx, cpu/avx512vnni, cpu/avx512, "
    "cpu/avx2, cpu/neon, cpu/portable, reference (slow and plain), or quicker with many rows: cpu/avx512/bf16 and "
    "cpu/amx/bf16 (what is multiplied with bf16 weights is rounded to bf16), cuda:0/rounded (what is multiplied with "
    "bf16 or fp16 weights is rounded to their type), cuda:0/lt (the same, and steps of 128 rows and more by cuBLASLt: "
    "a "
    "token may depend on how many rows were computed with it).");
ABSL_FLAG(int32_t, threads, 0,
          "Threads that a CPU computes on, 1 to 1024; 0: as many as this process may use processors (affinity and the "
          "quota of its control group). Stages that share a machine do not divide them. They change no token.");
ABSL_FLAG(std::string, link, "auto",
          "How rows reach the next stage: nccl (from GPU to GPU), grpc (by way of this process), or auto: nccl where "
          "both stages have it.");
ABSL_FLAG(absl::Duration, link_timeout, absl::Seconds(30),
          "With nccl: how long a step may wait for its neighbours before the pipeline is opened anew.");
ABSL_FLAG(int64_t, max_snapshot_bytes_in_flight, int64_t{256} << 20,
          "Copies of states on their way to the state store; beyond it a snapshot is refused, not waited for.");
ABSL_FLAG(int64_t, kept_state_bytes, int64_t{64} << 20,
          "Memory for states that several calls begin with (the prefix cache): the longest unused go back to the store "
          "alone. 0: none.");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(10), "From SIGTERM to the end of whatever still runs.");

namespace rwkv::worker {

Worker::Options OptionsOfFlags() {
  Worker::Options options;
  options.name = absl::GetFlag(FLAGS_name);
  options.listen = absl::GetFlag(FLAGS_listen);
  options.metrics_listen = absl::GetFlag(FLAGS_metrics_listen);
  options.port_file = absl::GetFlag(FLAGS_port_file);
  options.health_listen = common::HealthAddressFromFlags();
  options.security = common::SecurityOptionsFromFlags(common::Role::kWorker);
  options.tracing = common::TracerOptionsFromFlags("rwkv-worker", options.name);
  options.state_store = absl::GetFlag(FLAGS_state_store);
  options.model = absl::GetFlag(FLAGS_model);
  options.lora = absl::GetFlag(FLAGS_lora);
  options.lora_alpha = absl::GetFlag(FLAGS_lora_alpha);
  options.initial_states = absl::GetFlag(FLAGS_initial_states);
  options.stage = absl::GetFlag(FLAGS_stage);
  options.layers = absl::GetFlag(FLAGS_layers);
  options.slots = absl::GetFlag(FLAGS_slots);
  options.max_batch_tokens = absl::GetFlag(FLAGS_max_batch_tokens);
  options.group_norm_epsilon = absl::GetFlag(FLAGS_group_norm_eps);
  options.ignore_extra_tensors = absl::GetFlag(FLAGS_ignore_extra_tensors);
  options.deep_embed_context = absl::GetFlag(FLAGS_deep_embed_context);
  options.device = absl::GetFlag(FLAGS_device);
  options.threads = absl::GetFlag(FLAGS_threads);
  options.link = absl::GetFlag(FLAGS_link);
  options.link_timeout = absl::GetFlag(FLAGS_link_timeout);
  options.max_snapshot_bytes_in_flight = absl::GetFlag(FLAGS_max_snapshot_bytes_in_flight);
  options.kept_state_bytes = absl::GetFlag(FLAGS_kept_state_bytes);
  options.drain_timeout = absl::GetFlag(FLAGS_drain_timeout);
  return options;
}

}  // namespace rwkv::worker
