#include "services/common/tracing/trace_flags.h"

#include "absl/flags/flag.h"

// main_loop.cc shows the flags of this file in --help too.
ABSL_FLAG(std::string, otlp_traces_endpoint, "",
          "Collector of traces, OTLP over gRPC: HOST:PORT or http://HOST:PORT, not encrypted, or https://HOST:PORT. "
          "Empty: none, and no cost. One that is away or slow costs nothing but its spans.");

namespace rwkv::common {

Tracer::Options TracerOptionsFromFlags(const std::string& service, const std::string& process) {
  Tracer::Options options;
  options.endpoint = absl::GetFlag(FLAGS_otlp_traces_endpoint);
  options.service = service;
  options.process = process;
  return options;
}

}  // namespace rwkv::common
