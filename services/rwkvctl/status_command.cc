#include "services/rwkvctl/status_command.h"

#include <atomic>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "rwkv/v1/cluster.pb.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

constexpr char kClearScreen[] = "\x1b[H\x1b[2J";
constexpr absl::Duration kWatchInterval = absl::Seconds(1);
constexpr absl::Duration kWaitInterval = absl::Milliseconds(10);
constexpr char kServing[] = "serving";

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
      json["driven_by"] = process.driven_by();
      json["model"] = process.model();
    }
    if (process.role() == "router") {
      json["running_turns"] = process.running_turns();
      json["waiting_turns"] = process.waiting_turns();
      json["tokens_per_second"] = process.tokens_per_second();
    }
    processes.push_back(std::move(json));
  }
  Json lanes = Json::array();
  for (const v1::LaneStatus& lane : status.lanes()) {
    Json workers = Json::array();
    for (const std::string& worker : lane.workers()) workers.push_back(worker);
    lanes.push_back({{"router", lane.router()},
                     {"epoch", lane.epoch()},
                     {"model", lane.model()},
                     {"fingerprint", lane.fingerprint()},
                     {"numeric_family", lane.numeric_family()},
                     {"workers", std::move(workers)},
                     {"state", lane.state()},
                     {"slots", lane.slots()},
                     {"turns", lane.turns()},
                     {"slots_used", lane.slots_used()},
                     {"slots_warm", lane.slots_warm()},
                     {"rows_waiting", lane.rows_waiting()}});
  }
  Json json = {
      {"lanes", std::move(lanes)},
      {"tokens_per_second", status.tokens_per_second()},
      {"pipeline_state", status.pipeline_state()},
      {"running_turns", status.running_turns()},
      {"waiting_turns", status.waiting_turns()},
      {"processes", std::move(processes)},
  };
  if (status.has_model()) json["model"] = ModelToJson(status.model());
  return json;
}

// Who drives what.
std::string LanesToText(const v1::GetStatusResponse& status) {
  std::vector<std::vector<std::string>> rows = {
      {"LANE", "ROUTER", "MODEL", "WORKERS", "STATE", "TURNS", "SLOTS", "WARM", "ROWS WAITING"}};
  for (const v1::LaneStatus& lane : status.lanes()) {
    rows.push_back({absl::StrCat(rows.size() - 1), lane.router(), lane.model(), absl::StrJoin(lane.workers(), " > "),
                    lane.state(), absl::StrCat(lane.turns()), absl::StrCat(lane.slots_used(), "/", lane.slots()),
                    absl::StrCat(lane.slots_warm()), absl::StrCat(lane.rows_waiting())});
  }
  return FormatTable(rows);
}

// A worker's place in its lane; "spare" if others drive lanes and nobody this one.
std::string StageOf(const v1::ProcessStatus& worker, bool there_are_lanes) {
  if (there_are_lanes && worker.driven_by().empty()) return worker.health() == "serving" ? "spare" : "-";
  return absl::StrCat(worker.stage_index(), "/", worker.stage_count());
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
  uint64_t running = 0, waiting = 0;
  double tokens_per_second = 0;
  for (const v1::ProcessStatus& process : status.processes()) {  // Of all routers.
    running += process.running_turns();
    waiting += process.waiting_turns();
    tokens_per_second += process.tokens_per_second();
  }
  absl::StrAppend(&text, "turns:    ", running, " running, ", waiting, " waiting, ",
                  absl::StrFormat("%.1f", tokens_per_second), " tokens/s\n\n");
  if (status.lanes_size() > 0) absl::StrAppend(&text, LanesToText(status), "\n");
  std::string why;  // Behind the table, which a long reason would make too wide to read.
  std::vector<std::vector<std::string>> rows = {
      {"ROLE", "NAME", "PID", "ADDRESS", "METRICS", "HEALTH", "STAGE", "LAYERS", "SLOTS", "KERNELS"}};
  for (const v1::ProcessStatus& process : status.processes()) {
    std::vector<std::string> row = {process.role(),
                                    process.name(),
                                    process.pid() == 0 ? "-" : absl::StrCat(process.pid()),
                                    process.address(),
                                    process.metrics_address().empty() ? "-" : process.metrics_address(),
                                    process.health()};
    if (!process.message().empty()) {
      absl::StrAppend(&why, process.name().empty() ? process.address() : process.name(), ": ", process.health(), ": ",
                      process.message(), "\n");
    }
    if (process.role() == "worker") {
      row.push_back(StageOf(process, status.lanes_size() > 0));
      row.push_back(absl::StrCat(process.first_layer(), "..", process.end_layer() - 1));
      row.push_back(absl::StrCat(process.slots()));
      row.push_back(process.kernels());
    } else if (process.role() == "router") {
      row.insert(row.end(), {"", "", "", ""});
      row.push_back(absl::StrFormat("%d running, %d waiting, %.1f tokens/s", process.running_turns(),
                                    process.waiting_turns(), process.tokens_per_second()));
    }
    rows.push_back(std::move(row));
  }
  absl::StrAppend(&text, FormatTable(rows));
  if (!why.empty()) absl::StrAppend(&text, "\n", why);
  return text;
}

class StatusCommand : public Command {
 public:
  absl::string_view name() const override { return "status"; }
  absl::string_view summary() const override { return "shows every process: name, pid, address, health, layers"; }

  void AddFlags(FlagSet& flags) override {
    flags.AddBool("json", "JSON", &json_);
    flags.AddBool("watch", "draw it anew every second, until Ctrl-C", &watch_);
    flags.AddUint32("wait", "until the pipeline serves, for so many seconds at most",
                    [this](uint32_t seconds) { wait_ = absl::Seconds(seconds); });
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (watch_ && wait_ > absl::ZeroDuration()) {
      return absl::InvalidArgumentError("--watch and --wait: only one of them");
    }
    return CheckNoArguments(positional);
  }

  absl::Status Run(Context& context) override {
    if (watch_) return Watch(context);
    absl::StatusOr<v1::GetStatusResponse> status =
        wait_ > absl::ZeroDuration() ? Wait(context) : context.client->GetStatus();
    if (!status.ok()) return status.status();
    context.out << (json_ ? DumpIndented(ToJson(*status)) : ToText(*status));
    return absl::OkStatus();
  }

 private:
  // The status that says that it serves.
  absl::StatusOr<v1::GetStatusResponse> Wait(Context& context) const {
    absl::Notification stop;
    std::atomic<bool> stopped{false};
    const InterruptScope interrupts(context.interrupts, [&] {
      if (!stopped.exchange(true)) stop.Notify();
    });
    const absl::Time limit = absl::Now() + wait_;
    absl::StatusOr<v1::GetStatusResponse> status;
    do {
      status = context.client->GetStatus();
      if (status.ok() && status->pipeline_state() == kServing) return status;
    } while (!stop.WaitForNotificationWithTimeout(kWaitInterval) && absl::Now() < limit);
    const absl::string_view state = status.ok() ? status->pipeline_state() : status.status().message();
    if (stopped) return absl::CancelledError(absl::StrCat("interrupted; the cluster: ", state));
    return absl::DeadlineExceededError(
        absl::StrCat("the cluster does not serve after ", absl::FormatDuration(wait_), ": ", state));
  }

  // A cluster whose routers are away for a moment is shown as that.
  absl::Status Watch(Context& context) const {
    absl::Notification stop;
    std::atomic<bool> stopped{false};
    const InterruptScope interrupts(context.interrupts, [&] {
      if (!stopped.exchange(true)) stop.Notify();
    });
    do {
      absl::StatusOr<v1::GetStatusResponse> status = context.client->GetStatus();
      if (context.out_is_terminal && !json_) context.out << kClearScreen;
      if (!status.ok()) {
        context.out << "no answer: " << status.status().message() << "\n";
      } else {
        context.out << (json_ ? DumpLine(ToJson(*status)) : ToText(*status));
      }
      if (!json_) context.out << "\n";
      context.out << std::flush;
    } while (context.out.good() && !stop.WaitForNotificationWithTimeout(kWatchInterval));
    return absl::OkStatus();
  }

  bool json_ = false;
  bool watch_ = false;
  absl::Duration wait_ = absl::ZeroDuration();
};

}  // namespace

std::unique_ptr<Command> MakeStatusCommand() { return std::make_unique<StatusCommand>(); }

}  // namespace rwkv::rwkvctl
