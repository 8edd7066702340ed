// The frame around every main().
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace rwkv::common {

// Blocks SIGTERM and SIGINT in this thread and those it starts (RpcServer::ServeUntilSignal waits for them) and ignores
// SIGPIPE. Call before the first thread.
void PrepareSignals();

// int main(int argc, char** argv) { return RunMain(argc, argv, "Serves ...", Run); }
// Prepares the signals, parses Abseil flags (and --flagfile), names the process in the logs after the binary (run() may
// call InitLogging again with --name), calls `run`, and prints its error on one line of standard error.
// Returns 0 when `run` did well, 1 when it failed; an unknown flag, a bad flag value or a stray argument ends the
// process with status 2 and a message, --help with 0.
int RunMain(int argc, char** argv, const char* usage, absl::FunctionRef<absl::Status()> run);

}  // namespace rwkv::common
