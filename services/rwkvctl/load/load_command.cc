#include "services/rwkvctl/load/load_command.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/load/load_clock.h"
#include "services/rwkvctl/load/progress_line.h"
#include "services/rwkvctl/load/report.h"
#include "services/rwkvctl/load/runner.h"
#include "services/rwkvctl/load/workload.h"
#include "services/rwkvctl/output_file.h"
#include "services/rwkvctl/sampling_flags.h"

namespace rwkv::rwkvctl {
namespace {

constexpr uint32_t kMaxThreads = 4096;  // One a request in flight.
constexpr uint32_t kMaxSessions = 1000000;
constexpr absl::Duration kDefaultDuration = absl::Seconds(30);

class LoadCommand : public Command {
 public:
  absl::string_view name() const override { return "load"; }
  absl::string_view summary() const override { return "sends requests as many users would, and measures the answers"; }
  absl::string_view details() const override {
    return "One of --streams (a closed loop: each sends its next request when the last is answered), --rate (an open\n"
           "loop: requests come whatever became of those before) and --trace FILE, of one {\"offset\": seconds,\n"
           "\"prompt_tokens\": N, \"max_tokens\": N, \"session\": \"name\"} a line, says when requests are due. All\n"
           "times count from then, so that a wait in this program counts, too. Prompts are random token ids; answers\n"
           "go past the end of text, so that each has its length. LENGTH is N, or A..B: each as likely. D is a time\n"
           "like 500ms, 30s or 1h. Ctrl-C ends early and reports. Quantiles are within 0.4 % of the exact ones.\n"
           "Exit status 1: no request was completed.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddUint32("streams", "requests at a time, always", [this](uint32_t value) { streams_ = value; });
    flags.AddFloat("rate", "requests a second", [this](float value) { rate_ = value; });
    flags.AddString("arrivals", "KIND", "of --rate: poisson (default) or constant", &arrivals_);
    AddDuration(flags, "ramp", "the rate rises to --rate over this time (default 0s)", &ramp_);
    flags.AddString("trace", "FILE", "when requests come and what they are; - is standard input", &trace_path_);
    AddDuration(flags, "duration", "no request after this time (default 30s, unless --requests or --trace)",
                &duration_);
    AddDuration(flags, "warmup", "count only what comes after this time, and before the end of --duration", &warmup_);
    flags.AddUint64("requests", "at most so many", [this](uint64_t value) { requests_ = value; });
    AddLength(flags, "prompt-tokens", "length of a prompt (default 64)", 1, &prompt_tokens_);
    AddLength(flags, "max-tokens", "length of an answer (default 64)", 0, &max_tokens_);
    flags.AddUint32("sessions", "conversations at a time, each in a session (default 0: none)",
                    [this](uint32_t value) { sessions_ = value; });
    flags.AddUint32("turns", "of a conversation, before another begins (default 4)",
                    [this](uint32_t value) { turns_ = value; });
    flags.AddBool("keep-sessions", "do not delete them afterwards", &keep_sessions_);
    AddDuration(flags, "deadline", "of a request, from when it is due (default: none)", &deadline_);
    flags.AddBool("retry", "a request that is refused waits as it is told, and tries again", &retry_);
    flags.AddUint32("max-in-flight", "of --rate and --trace: requests at a time (default 1024); more wait here",
                    [this](uint32_t value) { max_in_flight_ = value; });
    AddDuration(flags, "ttft-limit", "goodput counts answers whose first token came in this time", &ttft_limit_);
    AddDuration(flags, "itl-limit", "and whose tokens, on average, came in this time after each other", &itl_limit_);
    flags.AddUint64("load-seed", "of arrivals, lengths and prompts (default 0)",
                    [this](uint64_t value) { seed_ = value; });
    flags.AddString("model", "NAME", "name or fingerprint (default: the one that is served)", &model_);
    flags.AddBool("json", "the report as one JSON object", &json_);
    flags.AddString("out", "FILE", "write that object to a file, too", &out_path_);
    AddSamplingFlags(flags, &sampling_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    RWKV_RETURN_IF_ERROR(CheckNoArguments(positional));
    if (streams_.has_value() + rate_.has_value() + !trace_path_.empty() != 1) {
      return absl::InvalidArgumentError("one of --streams N, --rate X and --trace FILE has to be given");
    }
    if (rate_.has_value() && !(*rate_ > 0)) return absl::InvalidArgumentError("--rate has to be positive");
    if (!arrivals_.empty() && arrivals_ != "poisson" && arrivals_ != "constant") {
      return absl::InvalidArgumentError(absl::StrCat("--arrivals \"", arrivals_, "\" is neither poisson nor constant"));
    }
    if (!rate_.has_value() && (!arrivals_.empty() || ramp_.has_value())) {
      return absl::InvalidArgumentError("--arrivals and --ramp are of --rate");
    }
    if (streams_.has_value() && max_in_flight_.has_value()) {
      return absl::InvalidArgumentError("--max-in-flight is of --rate and --trace; --streams says it itself");
    }
    if (warmup_.has_value() && Duration().has_value() && *warmup_ >= *Duration()) {
      return absl::InvalidArgumentError(absl::StrCat("--warmup ", absl::FormatDuration(*warmup_),
                                                     " leaves nothing to measure of --duration ",
                                                     absl::FormatDuration(*Duration())));
    }
    if (!trace_path_.empty() &&
        (sessions_.has_value() || turns_.has_value() || prompt_tokens_.has_value() || max_tokens_.has_value())) {
      return absl::InvalidArgumentError("--trace has lengths and sessions in its file");
    }
    if (turns_.has_value() && sessions_.value_or(0) == 0) return absl::InvalidArgumentError("--turns is of --sessions");
    RWKV_RETURN_IF_ERROR(CheckRange("streams", streams_, kMaxThreads));
    RWKV_RETURN_IF_ERROR(CheckRange("max-in-flight", max_in_flight_, kMaxThreads));
    RWKV_RETURN_IF_ERROR(CheckRange("sessions", sessions_, kMaxSessions));
    if (turns_.has_value() && *turns_ == 0) return absl::InvalidArgumentError("--turns has to be positive");
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    RWKV_ASSIGN_OR_RETURN(LoadOptions options, Options(context));
    absl::optional<OutputFile> out;  // Before the run, which may be long.
    if (!out_path_.empty()) {
      RWKV_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create(out_path_));
      out.emplace(std::move(file));
    }
    LoadProgressLine progress(context.err, context.err_is_terminal);
    options.progress_interval = progress.interval();
    Json settings = SettingsToJson(options);
    SteadyLoadClock clock;
    LoadRunner runner(std::move(options), context.client, &clock,
                      [&](const LoadProgress& now) { progress.Update(now); });
    absl::optional<LoadReport> report;
    {
      const InterruptScope interrupts(context.interrupts, [&runner] { runner.Stop(); });
      report.emplace(runner.Run());
    }
    Json json;
    json["settings"] = std::move(settings);
    json.update(LoadReportToJson(*report));
    const std::string line = DumpLine(json);
    context.out << (json_ ? line : LoadReportToTable(*report));
    if (out.has_value()) {
      RWKV_RETURN_IF_ERROR(out->Write(line));
      RWKV_RETURN_IF_ERROR(out->Commit());
    }
    if (report->completed == 0 && !report->first_error.ok()) {
      return absl::Status(report->first_error.code(),
                          absl::StrCat("no request was completed; the first said: ", report->first_error.message()));
    }
    return absl::OkStatus();
  }

 private:
  static void AddDuration(FlagSet& flags, absl::string_view name, absl::string_view help,
                          absl::optional<absl::Duration>* duration) {
    flags.AddString(name, "D", help, [duration](const std::string& text) {
      absl::Duration value;
      if (!absl::ParseDuration(text, &value) || value <= absl::ZeroDuration() || value > absl::Hours(24 * 365)) {
        return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is no time like 500ms, 30s or 1h"));
      }
      *duration = value;
      return absl::OkStatus();
    });
  }

  static void AddLength(FlagSet& flags, absl::string_view name, absl::string_view help, uint32_t min,
                        absl::optional<LengthRange>* length) {
    flags.AddString(name, "LENGTH", help, [min, length](const std::string& text) {
      absl::StatusOr<LengthRange> range = ParseLengthRange(text, min);
      if (range.ok()) *length = *range;
      return range.status();
    });
  }

  static absl::Status CheckRange(absl::string_view name, absl::optional<uint32_t> value, uint32_t max) {
    if (!value.has_value() || (*value >= 1 && *value <= max)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--", name, " ", *value, " is not in 1 .. ", max));
  }

  absl::optional<absl::Duration> Duration() const {
    const bool ends_by_itself = requests_.has_value() || !trace_path_.empty();
    return duration_.has_value() || ends_by_itself ? duration_ : absl::make_optional(kDefaultDuration);
  }

  absl::StatusOr<LoadOptions> Options(Context& context) const {
    LoadOptions options;
    options.workload.seed = seed_;
    if (!trace_path_.empty()) {
      RWKV_ASSIGN_OR_RETURN(const std::string text, trace_path_ == "-" ? ReadAll(context.in) : ReadFile(trace_path_));
      absl::StatusOr<Trace> trace = ParseTrace(text);
      if (!trace.ok()) return absl::InvalidArgumentError(absl::StrCat(trace_path_, ": ", trace.status().message()));
      options.workload.trace = *std::move(trace);
    }
    if (rate_.has_value()) {
      options.workload.arrivals.emplace();
      options.workload.arrivals->rate = *rate_;
      options.workload.arrivals->poisson = arrivals_ != "constant";
      options.workload.arrivals->ramp = ramp_.value_or(absl::ZeroDuration());
    }
    options.workload.prompt_tokens = prompt_tokens_.value_or(LengthRange{64, 64});
    options.workload.max_tokens = max_tokens_.value_or(LengthRange{64, 64});
    options.workload.requests = requests_;
    options.workload.duration = Duration();
    options.max_in_flight = static_cast<int>(streams_.value_or(max_in_flight_.value_or(1024)));
    options.sessions = sessions_.value_or(0);
    options.turns = turns_.value_or(4);
    options.keep_sessions = keep_sessions_;
    options.model = model_;
    options.sampling = sampling_;
    options.deadline = deadline_.value_or(absl::InfiniteDuration());
    options.retry = retry_;
    if (warmup_.has_value()) {
      options.measured = {*warmup_, options.workload.duration.value_or(absl::InfiniteDuration())};
    }
    options.limits = {ttft_limit_, itl_limit_};
    RWKV_ASSIGN_OR_RETURN(options.vocab_size, VocabSize(*context.client));
    return options;
  }

  absl::StatusOr<uint32_t> VocabSize(router::RouterClient& client) const {
    RWKV_ASSIGN_OR_RETURN(const v1::ListModelsResponse models, client.ListModels());
    for (const v1::ModelInfo& model : models.models()) {
      if (!model_.empty() && model_ != model.name() && model_ != model.fingerprint()) continue;
      if (model.vocab_size() >= 2) return static_cast<uint32_t>(model.vocab_size());
      return absl::FailedPreconditionError(absl::StrCat("a vocabulary of ", model.vocab_size(), " has no prompts"));
    }
    if (model_.empty()) return absl::UnavailableError("no model is served just now");
    return absl::NotFoundError(absl::StrCat("no model \"", model_, "\" is served"));
  }

  // What was asked for, so that a report can be understood, and repeated, later.
  Json SettingsToJson(const LoadOptions& options) const {
    Json json;
    const auto add_length = [&](const char* name, const LengthRange& range) {
      json[name] = Json::array({range.first, range.last});
    };
    if (streams_.has_value()) json["streams"] = *streams_;
    if (rate_.has_value()) {
      json["rate"] = *rate_;
      json["arrivals"] = options.workload.arrivals->poisson ? "poisson" : "constant";
      if (ramp_.has_value()) json["ramp_seconds"] = absl::ToDoubleSeconds(*ramp_);
    }
    if (options.workload.trace.has_value()) {
      json["trace_requests"] = options.workload.trace->requests.size();
    } else {
      add_length("prompt_tokens", options.workload.prompt_tokens);
      add_length("max_tokens", options.workload.max_tokens);
      json["sessions"] = options.sessions;
      if (options.sessions > 0) json["turns"] = options.turns;
    }
    if (requests_.has_value()) json["requests"] = *requests_;
    if (options.workload.duration.has_value()) {
      json["duration_seconds"] = absl::ToDoubleSeconds(*options.workload.duration);
    }
    if (warmup_.has_value()) json["warmup_seconds"] = absl::ToDoubleSeconds(*warmup_);
    if (deadline_.has_value()) json["deadline_seconds"] = absl::ToDoubleSeconds(*deadline_);
    json["retry"] = retry_;
    if (!streams_.has_value()) json["max_in_flight"] = options.max_in_flight;
    json["load_seed"] = seed_;
    return json;
  }

  absl::optional<uint32_t> streams_;
  absl::optional<float> rate_;
  std::string arrivals_;
  absl::optional<absl::Duration> ramp_;
  std::string trace_path_;
  absl::optional<absl::Duration> duration_;
  absl::optional<absl::Duration> warmup_;
  absl::optional<uint64_t> requests_;
  absl::optional<LengthRange> prompt_tokens_;
  absl::optional<LengthRange> max_tokens_;
  absl::optional<uint32_t> sessions_;
  absl::optional<uint32_t> turns_;
  bool keep_sessions_ = false;
  absl::optional<absl::Duration> deadline_;
  bool retry_ = false;
  absl::optional<uint32_t> max_in_flight_;
  absl::optional<absl::Duration> ttft_limit_;
  absl::optional<absl::Duration> itl_limit_;
  uint64_t seed_ = 0;
  std::string model_;
  bool json_ = false;
  std::string out_path_;
  v1::Sampling sampling_;
};

}  // namespace

std::unique_ptr<Command> MakeLoadCommand() { return std::make_unique<LoadCommand>(); }

}  // namespace rwkv::rwkvctl
