#include "services/rwkvctl/store_command.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace rwkv::rwkvctl {
namespace {

// The state store's program, which alone can read its files: beside this one, or where the build puts it.
absl::StatusOr<std::string> FindStateStore() {
  std::error_code failed;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", failed).parent_path();
  for (const char* const path : {"state_store", "../state_store/state_store"}) {
    if (std::filesystem::is_regular_file(self / path, failed)) return (self / path).string();
  }
  return absl::NotFoundError(absl::StrCat("there is no program state_store beside ", self.string(), "/rwkvctl"));
}

// Runs it and hands on what it prints. It says itself what went wrong.
absl::Status RunProgram(const std::vector<std::string>& command, std::ostream& out) {
  int ends[2];
  if (pipe(ends) != 0) return absl::UnavailableError(std::strerror(errno));
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(ends[1], 1);
    close(ends[0]);
    close(ends[1]);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return absl::UnavailableError(std::strerror(errno));
  }
  char buffer[4096];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof(buffer))) != 0;) {
    if (got < 0 && errno != EINTR) break;
    if (got > 0) out.write(buffer, got);
  }
  close(ends[0]);
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return FlushOutput(out);
  return absl::FailedPreconditionError("state_store has said why, above");
}

class StoreCommand : public Command {
 public:
  absl::string_view name() const override { return "store"; }
  absl::string_view arguments() const override { return "check|repair|move FOLDER"; }
  absl::string_view summary() const override { return "checks, repairs or moves a state store that is stopped"; }
  absl::string_view details() const override {
    return "check   reads every row, manifest and record of the embedded store in FOLDER and changes nothing; says "
           "which\n"
           "        sessions are touched, and counts\n"
           "repair  saves the sessions that are whole and names the others; damaged files stay in FOLDER/damaged-N. A\n"
           "        session that is older than what was acknowledged answers DATA_LOSS until it is rewound or deleted\n"
           "move    copies all sessions and states to PostgreSQL and S3 (--catalog, --records, ...), which must hold "
           "none\n";
  }
  bool needs_router() const override { return false; }

  void AddFlags(FlagSet& flags) override {
    static constexpr const char* kFlags[][3] = {
        {"catalog", "URL", "for move: postgres://USER@HOST:PORT/DATABASE"},
        {"catalog-password-file", "FILE", "with its password"},
        {"records", "URL", "for move: s3://BUCKET/PREFIX"},
        {"s3-endpoint", "URL", "http://HOST:PORT or https://HOST"},
        {"s3-region", "NAME", "that requests are signed for (default us-east-1)"},
        {"s3-credentials-file", "FILE", "with two lines: access key, secret key"},
    };
    for (const auto& [flag, value, help] : kFlags) {
      std::string theirs = flag;
      for (char& c : theirs) c = c == '-' ? '_' : c;
      flags.AddString(flag, value, help, [this, theirs](const std::string& given) {
        flags_.push_back(absl::StrCat("--", theirs, "=", given));
        return absl::OkStatus();
      });
    }
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (positional.size() != 2) return absl::InvalidArgumentError("want check, repair or move, and the store's FOLDER");
    what_ = positional[0];
    folder_ = positional[1];
    if (what_ != "check" && what_ != "repair" && what_ != "move") {
      return absl::InvalidArgumentError(absl::StrCat("\"", what_, "\" is none of check, repair, move"));
    }
    if (what_ != "move" && !flags_.empty()) return absl::InvalidArgumentError(absl::StrCat(flags_[0], " is for move"));
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    absl::StatusOr<std::string> program = FindStateStore();
    if (!program.ok()) return program.status();
    std::vector<std::string> command = {*program, "--name=store",
                                        "--metrics_listen=", absl::StrCat("--offline=", what_),
                                        absl::StrCat("--data_dir=", folder_)};
    command.insert(command.end(), flags_.begin(), flags_.end());
    return RunProgram(command, context.out);
  }

 private:
  std::string what_;
  std::string folder_;
  std::vector<std::string> flags_;
};

}  // namespace

std::unique_ptr<Command> MakeStoreCommand() { return std::make_unique<StoreCommand>(); }

}  // namespace rwkv::rwkvctl
