#include "services/rwkvctl/status_command.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "rwkv/v1/cluster.pb.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

Json ToJson(const v1::GetStatusResponse& status) {
  Json processes = Json::array();
  for (const v1::ProcessStatus& process : status.processes()) {
    Json json = {
        {"role", process.role()},       {"name", process.name()},     {"pid", process.pid()},
        {"address", process.address()}, {"health", process.health()}, {"metrics_address", process.metrics_address()},
        {"message", process.message()},
    };
    if (process.role() == "worker") {
      json["stage_index"] = process.stage_index();
      json["stage_count"] = process.stage_count();
      json["first_layer"] = process.first_layer();
      json["end_layer"] = process.end_layer();
      json["slots"] = process.slots();
      json["kernels"] = process.kernels();
    }
    processes.push_back(std::move(json));
  }
  Json json = {
      {"pipeline_state", status.pipeline_state()},
      {"running_turns", status.running_turns()},
      {"waiting_turns", status.waiting_turns()},
      {"processes", std::move(processes)},
  };
  if (status.has_model()) json["model"] = ModelToJson(status.model());
  return json;
}

std::string ToText(const v1::GetStatusResponse& status) {
  std::string text = absl::StrCat("pipeline: ", status.pipeline_state(), "\n");
  if (status.has_model()) {
    const v1::ModelInfo& model = status.model();
    absl::StrAppend(&text, "model:    ", model.name(), " (RWKV-", model.version(), ", ", model.layer_count(),
                    " layers, width ", model.width(), ", vocabulary ", model.vocab_size(), ", ", model.dtype(),
                    ", tokenizer ", model.tokenizer().empty() ? "none" : model.tokenizer(), ")\n");
    if (model.initial_states_size() > 0) {
      absl::StrAppend(&text, "states:   ", absl::StrJoin(model.initial_states(), ", "), "\n");
    }
  }
  absl::StrAppend(&text, "turns:    ", status.running_turns(), " running, ", status.waiting_turns(), " waiting\n\n");
  std::vector<std::vector<std::string>> rows = {
      {"ROLE", "NAME", "PID", "ADDRESS", "METRICS", "HEALTH", "STAGE", "LAYERS", "SLOTS", "KERNELS"}};
  for (const v1::ProcessStatus& process : status.processes()) {
    std::vector<std::string> row = {
        process.role(),
        process.name(),
        process.pid() == 0 ? "-" : absl::StrCat(process.pid()),
        process.address(),
        process.metrics_address().empty() ? "-" : process.metrics_address(),
        process.message().empty() ? process.health() : absl::StrCat(process.health(), ": ", process.message())};
    if (process.role() == "worker") {
      row.push_back(absl::StrCat(process.stage_index(), "/", process.stage_count()));
      row.push_back(absl::StrCat(process.first_layer(), "..", process.end_layer() - 1));
      row.push_back(absl::StrCat(process.slots()));
      row.push_back(process.kernels());
    }
    rows.push_back(std::move(row));
  }
  return text + FormatTable(rows);
}

class StatusCommand : public Command {
 public:
  absl::string_view name() const override { return "status"; }
  absl::string_view summary() const override { return "shows every process: name, pid, address, health, layers"; }

  void AddFlags(FlagSet& flags) override { flags.AddBool("json", "JSON", &json_); }

  absl::Status Check(const std::vector<std::string>& positional) override { return CheckNoArguments(positional); }

  absl::Status Run(Context& context) override {
    absl::StatusOr<v1::GetStatusResponse> status = context.client->GetStatus();
    if (!status.ok()) return status.status();
    context.out << (json_ ? DumpIndented(ToJson(*status)) : ToText(*status));
    return absl::OkStatus();
  }

 private:
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeStatusCommand() { return std::make_unique<StatusCommand>(); }

}  // namespace rwkv::rwkvctl
