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
// Then it ends the process (end_process.h): with status 0 when `run` did well, 1 when it failed. A stray argument
// returns 2 with a message; an unknown flag or a bad flag value ends the process with 2, --help with 0.
int RunMain(int argc, char** argv, const char* usage, absl::FunctionRef<absl::Status()> run);

}  // namespace rwkv::common
