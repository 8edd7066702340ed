#include "services/common/main_loop.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "grpc/support/log.h"
#include "services/common/end_process.h"
#include "services/common/logging.h"

namespace rwkv::common {
namespace {

constexpr int kUsageExitCode = 2;

// Abseil ends the process with status 1 for a bad flag and for --help alike, and offers no other way. While flags are
// parsed, `exit_code` >= 0 makes the process end with that status instead.
int exit_code = -1;

void ExitWithUsageCode() {
  if (exit_code < 0) return;
  std::fflush(nullptr);
  _exit(exit_code);
}

bool AsksForHelp(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (argument == "--") return false;
    while (absl::StartsWith(argument, "-")) argument.remove_prefix(1);
    if (argument.size() < absl::string_view(argv[i]).size() &&
        (absl::StartsWith(argument, "help") || argument == "version")) {
      return true;
    }
  }
  return false;
}

std::string OneLine(absl::string_view text) { return absl::StrReplaceAll(text, {{"\r", " "}, {"\n", " "}}); }

absl::string_view BaseName(absl::string_view path) { return path.substr(path.rfind('/') + 1); }

// gRPC's own complaints (a port in use, a broken peer) in the form of our lines.
void LogFromGrpc(gpr_log_func_args* args) {
  LogWarning("grpc", {{"file", BaseName(args->file)}, {"line", args->line}, {"message", args->message}});
}

}  // namespace

void PrepareSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

int RunMain(int argc, char** argv, const char* usage, absl::FunctionRef<absl::Status()> run) {
  PrepareSignals();
  const std::string name(BaseName(argc > 0 ? argv[0] : "rwkv"));
  InitLogging(name);
  gpr_set_log_function(LogFromGrpc);

  absl::SetProgramUsageMessage(usage);
  // --help: the flags of this program, which main.cc or NAME_flags.cc defines, not those of the libraries.
  absl::FlagsUsageConfig help;
  help.contains_help_flags = [](absl::string_view file) {
    return absl::EndsWith(file, "/main.cc") || absl::EndsWith(file, "_flags.cc");
  };
  help.contains_helpshort_flags = help.contains_help_flags;
  absl::SetFlagsUsageConfig(help);
  exit_code = AsksForHelp(argc, argv) ? 0 : kUsageExitCode;
  std::atexit(ExitWithUsageCode);
  const std::vector<char*> arguments = absl::ParseCommandLine(argc, argv);
  exit_code = -1;
  if (arguments.size() > 1) {
    std::fprintf(stderr, "%s: unexpected argument \"%s\"; see --help\n", name.c_str(), OneLine(arguments[1]).c_str());
    return kUsageExitCode;
  }

  const absl::Status status = run();
  if (!status.ok()) std::fprintf(stderr, "%s: %s\n", name.c_str(), OneLine(status.ToString()).c_str());
  EndProcess(status.ok() ? 0 : 1);
}

}  // namespace rwkv::common
