// The flag of traces that every serving process has.
#pragma once

#include <string>

#include "services/common/tracing/tracer.h"

namespace rwkv::common {

// --otlp_traces_endpoint. `process` is the --name of this one, `service` its kind: "rwkv-worker".
Tracer::Options TracerOptionsFromFlags(const std::string& service, const std::string& process);

}  // namespace rwkv::common
