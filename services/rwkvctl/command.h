// What a subcommand is made of.
#pragma once

#include <functional>
#include <istream>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/flag_set.h"

namespace rwkv::rwkvctl {

// What Ctrl-C does. Without a handler it ends the process.
class Interrupts {
 public:
  virtual ~Interrupts() = default;
  // From another thread; calls nobody after it was replaced by another or by null.
  virtual void SetHandler(std::function<void()> handler) = 0;
};

// Ctrl-C calls `handler`, from another thread, while this lives.
class InterruptScope {
 public:
  InterruptScope(Interrupts& interrupts, std::function<void()> handler) : interrupts_(interrupts) {
    interrupts_.SetHandler(std::move(handler));
  }
  ~InterruptScope() { interrupts_.SetHandler(nullptr); }
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

 private:
  Interrupts& interrupts_;
};

// What a command works with. Everything outlives the command.
struct Context {
  router::RouterClient* client = nullptr;  // Null for commands that need no router.
  std::istream& in;
  std::ostream& out;  // Results only; messages go to err.
  std::ostream& err;
  Interrupts& interrupts;
  bool in_is_terminal = false;
  bool out_is_terminal = false;
  bool err_is_terminal = false;
};

// Made for one run: flags are members.
class Command {
 public:
  virtual ~Command() = default;

  virtual absl::string_view name() const = 0;
  virtual absl::string_view arguments() const { return ""; }  // After the name, for the help: "[TEXT]".
  virtual absl::string_view summary() const = 0;              // One line.
  virtual absl::string_view details() const { return ""; }    // Lines after the flags in the help.

  virtual bool needs_router() const { return true; }

  virtual void AddFlags(FlagSet& flags) = 0;
  // After the flags were set. An error is wrong usage.
  virtual absl::Status Check(const std::vector<std::string>& positional) = 0;
  virtual absl::Status Run(Context& context) = 0;
};

// kInvalidArgument unless there are none.
absl::Status CheckNoArguments(const std::vector<std::string>& positional);

// Flushes; kUnavailable when what was written did not get through ("cannot write to standard output").
absl::Status FlushOutput(std::ostream& out);

}  // namespace rwkv::rwkvctl
