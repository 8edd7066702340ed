#include "services/rwkvctl/rwkvctl.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/types/optional.h"
#include "services/common/grpc_status.h"
#include "services/rwkvctl/chat_command.h"
#include "services/rwkvctl/convert_command.h"
#include "services/rwkvctl/embed_command.h"
#include "services/rwkvctl/eval_command.h"
#include "services/rwkvctl/generate_command.h"
#include "services/rwkvctl/inspect_command.h"
#include "services/rwkvctl/load/load_command.h"
#include "services/rwkvctl/local_clusters.h"
#include "services/rwkvctl/logits_command.h"
#include "services/rwkvctl/sessions_command.h"
#include "services/rwkvctl/state_command.h"
#include "services/rwkvctl/status_command.h"
#include "services/rwkvctl/store_command.h"
#include "services/rwkvctl/tokenize_command.h"
#include "services/rwkvctl/usage_command.h"

namespace rwkv::rwkvctl {
namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

std::vector<std::unique_ptr<Command>> MakeCommands() {
  std::vector<std::unique_ptr<Command>> commands;
  commands.push_back(MakeGenerateCommand());
  commands.push_back(MakeChatCommand());
  commands.push_back(MakeSessionsCommand());
  commands.push_back(MakeTokenizeCommand());
  commands.push_back(MakeDetokenizeCommand());
  commands.push_back(MakeStatusCommand());
  commands.push_back(MakeUsageCommand());
  commands.push_back(MakeEmbedCommand());
  commands.push_back(MakeEvalCommand());
  commands.push_back(MakeLoadCommand());
  commands.push_back(MakeLogitsCommand());
  commands.push_back(MakeStateCommand());
  commands.push_back(MakeStoreCommand());
  commands.push_back(MakeInspectCommand());
  commands.push_back(MakeConvertCommand());
  return commands;
}

std::string OneLine(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"\r\n", " "}, {"\n", " "}, {"\r", " "}});
}

// "INVALID_ARGUMENT: sampling.top_p: must be in (0, 1], not 1.5"
std::string Describe(const absl::Status& status) {
  std::string line = absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
  if (const absl::optional<std::string> field = common::GetInvalidField(status);
      field.has_value() && !absl::StrContains(status.message(), *field)) {
    absl::StrAppend(&line, " (field ", *field, ")");
  }
  if (const absl::optional<absl::Duration> delay = common::GetRetryDelay(status)) {
    absl::StrAppend(&line, " (retry in ", absl::FormatDuration(*delay), ")");
  }
  return OneLine(line);
}

std::string GlobalHelp(const std::vector<std::unique_ptr<Command>>& commands, const FlagSet& global) {
  std::string help = "Usage: rwkvctl [--router HOST:PORT[,...]] COMMAND [FLAGS] [ARGUMENTS]\n\nCommands:\n";
  for (const std::unique_ptr<Command>& command : commands) {
    std::string name = absl::StrCat("  ", command->name());
    name.resize(14, ' ');
    absl::StrAppend(&help, name, command->summary(), "\n");
  }
  absl::StrAppend(&help, "\nFlags of every command:\n", global.Help(),
                  "\nFlags may stand before or after the command, as --flag value or --flag=value.\n"
                  "`rwkvctl help COMMAND` tells more. Exit status: 0, 1 when the call failed, 2 for wrong usage.\n");
  return help;
}

std::string CommandHelp(const Command& command, const FlagSet& flags, const FlagSet& global) {
  std::string help =
      absl::StrCat("Usage: rwkvctl ", command.name(), " [FLAGS]", command.arguments().empty() ? "" : " ",
                   command.arguments(), "\n\n", command.summary(), "\n\nFlags:\n", flags.Help(), global.Help());
  if (!command.details().empty()) absl::StrAppend(&help, "\n", command.details());
  return help;
}

}  // namespace

int Run(const std::vector<std::string>& arguments, const Environment& environment) {
  const auto fail = [&](int exit_status, absl::string_view message) {
    environment.err << "rwkvctl: " << message << std::endl;
    return exit_status;
  };

  std::vector<std::unique_ptr<Command>> commands = MakeCommands();
  std::vector<FlagSet> flags(commands.size());
  for (size_t c = 0; c < commands.size(); ++c) commands[c]->AddFlags(flags[c]);

  absl::optional<std::string> router;
  common::ClientSecurityOptions security;
  bool help = false;
  const auto add_global = [&](FlagSet& set) {
    set.AddString("router", "HOST:PORT[,...]",
                  "where the router listens, or several of one cluster (default: the local cluster that runs)",
                  [&router](const std::string& value) {
                    router = value;
                    return CheckRouters(value);
                  });
    set.AddString("tls-authorities", "FILE",
                  "PEM: whose certificates are believed; with it the connection is encrypted", &security.authorities);
    set.AddString("tls-certificate", "FILE", "PEM: the certificate to show, with --tls-key", &security.certificate);
    set.AddString("tls-key", "FILE", "PEM: its private key", &security.key);
    set.AddString("tls-server-name", "NAME",
                  "whom the router's certificate must be for (default: the host of --router)", &security.server_name);
    set.AddString("api-key-file", "FILE", "holds the API key to show; sent over TLS only", &security.api_key_file);
    set.AddBool("help", "print this", &help);
  };
  FlagSet global;
  add_global(global);

  // The command is the first argument that is neither a flag nor the value of one. Which flags take a value must be
  // known before the command is: names mean the same form in every command.
  const auto takes_value = [&](absl::string_view name) {
    if (global.TakesValue(name)) return true;
    for (const FlagSet& set : flags) {
      if (set.TakesValue(name)) return true;
    }
    return false;
  };
  std::vector<std::string> rest;
  absl::optional<std::string> name;
  bool flags_end = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    std::string argument = arguments[i] == "-h" ? "--help" : arguments[i];
    const absl::string_view flag = flags_end ? absl::string_view() : FlagName(argument);
    if (argument == "--") flags_end = true;
    if (flag.empty() && !name.has_value() && argument != "--") {
      name = argument;
      continue;
    }
    const bool value_follows = !flag.empty() && !absl::StrContains(argument, '=') && takes_value(flag);
    rest.push_back(std::move(argument));
    if (value_follows && i + 1 < arguments.size()) rest.push_back(arguments[++i]);
  }

  if (!name.has_value()) {
    absl::StatusOr<std::vector<std::string>> parsed = global.Parse(rest);
    if (!parsed.ok()) return fail(kWrongUsage, OneLine(parsed.status().message()));
    if (!help) return fail(kWrongUsage, "no command is given; see rwkvctl --help");
    environment.out << GlobalHelp(commands, global) << std::flush;
    return 0;
  }
  if (*name == "help") {
    const absl::StatusOr<std::vector<std::string>> asked = global.Parse(rest);
    if (!asked.ok()) return fail(kWrongUsage, OneLine(absl::StrCat("help: ", asked.status().message())));
    if (asked->size() > 1) {
      return fail(kWrongUsage, OneLine(absl::StrCat("help: unexpected argument \"", (*asked)[1], "\"")));
    }
    if (asked->empty() || asked->front() == "help") {
      environment.out << GlobalHelp(commands, global) << std::flush;
      return 0;
    }
    name = asked->front();
    rest = {"--help"};
  }
  size_t index = 0;
  while (index < commands.size() && commands[index]->name() != *name) ++index;
  if (index == commands.size()) {
    return fail(kWrongUsage, OneLine(absl::StrCat("unknown command \"", *name, "\"; see rwkvctl --help")));
  }

  Command& command = *commands[index];
  const auto wrong_usage = [&](const absl::Status& status) {
    return fail(kWrongUsage, OneLine(absl::StrCat(*name, ": ", status.message())));
  };
  FlagSet all = flags[index];
  add_global(all);
  absl::StatusOr<std::vector<std::string>> positional = all.Parse(rest);
  if (help) {
    environment.out << CommandHelp(command, flags[index], global) << std::flush;
    return 0;
  }
  if (!positional.ok()) return wrong_usage(positional.status());
  if (absl::Status status = command.Check(*positional); !status.ok()) return wrong_usage(status);

  std::unique_ptr<router::RouterClient> client;
  if (command.needs_router()) {
    const bool plain = security.authorities.empty();
    const bool no_tls_flag = plain && security.certificate.empty() && security.key.empty() &&
                             security.api_key_file.empty() && security.server_name.empty();
    const std::vector<LocalCluster> clusters = RunningClusters(environment.clusters_folder);
    const LocalCluster* local = nullptr;
    absl::StatusOr<LocalCluster> only;
    if (router.has_value()) {
      local = ClusterOf(*router, clusters);
    } else {
      only = OnlyCluster(clusters);
      if (!only.ok()) return fail(kFailed, OneLine(only.status().message()));
      router = only->router;
      local = &*only;
    }
    if (no_tls_flag && local != nullptr) {
      security.authorities = local->tls_authorities;
      security.api_key_file = local->api_key_file;
    } else if (plain && !no_tls_flag) {
      return wrong_usage(absl::InvalidArgumentError(
          "--tls-certificate, --tls-key, --tls-server-name and --api-key-file want --tls-authorities"));
    }
    absl::StatusOr<std::unique_ptr<router::RouterClient>> connected = environment.connect(*router, security);
    if (!connected.ok()) return fail(kFailed, Describe(connected.status()));
    client = *std::move(connected);
  }
  Context context{client.get(),
                  environment.in,
                  environment.out,
                  environment.err,
                  environment.interrupts,
                  environment.in_is_terminal,
                  environment.out_is_terminal,
                  environment.err_is_terminal};
  absl::Status status = command.Run(context);
  if (status.ok()) status = FlushOutput(environment.out);
  if (!status.ok()) {
    environment.out.flush();
    std::string message = Describe(status);
    // "Socket closed" alone does not say whose.
    if (absl::IsUnavailable(status) && client != nullptr && environment.out.good() &&
        !absl::StrContains(message, *router)) {
      absl::StrAppend(&message, " (router ", *router, ")");
    }
    // A server that does not believe a certificate hangs up without a word.
    if (absl::IsUnavailable(status) && !security.certificate.empty() && absl::StrContains(message, "Socket closed")) {
      absl::StrAppend(&message, "; perhaps it does not believe ", security.certificate);
    }
    return fail(kFailed, message);
  }
  return 0;
}

}  // namespace rwkv::rwkvctl
