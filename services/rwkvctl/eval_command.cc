#include "services/rwkvctl/eval_command.h"

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "services/rwkvctl/eval_context.h"
#include "services/rwkvctl/eval_lambada.h"
#include "services/rwkvctl/eval_needle.h"
#include "services/rwkvctl/eval_perplexity.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/progress_bar.h"

namespace rwkv::rwkvctl {
namespace {

class EvalCommand : public Command {
 public:
  absl::string_view name() const override { return "eval"; }
  absl::string_view arguments() const override { return "perplexity|lambada|context FILE, or needle"; }
  absl::string_view summary() const override { return "measures the model on texts, through the cluster"; }
  absl::string_view details() const override {
    return "FILE - is standard input.\n"
           "perplexity  FILE is fed as one document after id 0: nats per token, bits per byte. Its bytes are taken as\n"
           "            they are; the router's limit is its --max_document_bytes, 16 MiB by default.\n"
           "lambada     FILE has a {\"text\": \"...\"} a line. Fed is id 0 and the text up to its last blank; the "
           "last\n"
           "            word, with that blank, is right if each of its tokens is the likeliest. Perplexity is a "
           "word's.\n"
           "context     Loss by position, over windows of FILE that each begin with a fresh state after id 0. +- is "
           "one\n"
           "            standard error over the windows; a rise of less than two may be chance.\n"
           "needle      A pass key of five digits in a long text, asked for at its end: accuracy by length and "
           "depth.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddBool("json", "one JSON object", &json_);
    flags.AddString("initial-state", "NAME", "begin every text with this tuned state (default: the model's own)",
                    &initial_state_);
    AddNumber(flags, "window-tokens", {"context"}, "length of a window (default 8192)",
              [this](uint32_t value) { context_.tokens = value; });
    AddNumber(flags, "windows", {"context"}, "at most so many (default 32)",
              [this](uint32_t value) { context_.windows = value; });
    AddNumber(flags, "length", {"needle"}, "tokens of the whole text; may be given often (default 256 512 1024 2048)",
              [this](uint32_t value) { lengths_.push_back(value); });
    AddNumber(flags, "depth", {"needle"},
              "where the key stands, in percent; may be given often (default 0 25 50 75 100)",
              [this](uint32_t value) { depths_.push_back(value); });
    AddNumber(flags, "trials", {"needle"}, "keys per length and depth (default 3)",
              [this](uint32_t value) { needle_.trials = value; });
    AddNumber(flags, "parallel", {"lambada", "needle"},
              "texts at a time (default 16), which the router batches; the numbers do not depend on it",
              [this](uint32_t value) { parallel_ = value; });
    flags.AddString("haystack", "FILE", "needle: the text of no interest (default: a few plain sentences)",
                    [this](const std::string& value) {
                      given_.push_back({"haystack", {"needle"}});
                      haystack_path_ = value;
                      return absl::OkStatus();
                    });
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (positional.empty()) {
      return absl::InvalidArgumentError("what to measure is missing: perplexity, lambada, context, needle");
    }
    what_ = positional[0];
    if (what_ == "needle") {
      if (positional.size() != 1) return absl::InvalidArgumentError("needle takes no FILE, but --haystack FILE");
    } else if (what_ != "perplexity" && what_ != "lambada" && what_ != "context") {
      return absl::InvalidArgumentError(
          absl::StrCat("unknown measure \"", what_, "\"; there are perplexity, lambada, context, needle"));
    } else if (positional.size() != 2) {
      return absl::InvalidArgumentError(absl::StrCat(what_, " takes one FILE"));
    } else {
      path_ = positional[1];
    }
    for (const Given& flag : given_) {
      if (std::find(flag.measures.begin(), flag.measures.end(), what_) != flag.measures.end()) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag.name, " is of ", absl::StrJoin(flag.measures, " and "), ", not of ", what_));
    }
    if (context_.tokens == 0 || context_.windows == 0 || needle_.trials == 0) {
      return absl::InvalidArgumentError("--window-tokens, --windows and --trials have to be positive");
    }
    if (parallel_ < 1 || parallel_ > kMaxParallel) {
      return absl::InvalidArgumentError(absl::StrCat("--parallel ", parallel_, " is not in 1 .. ", kMaxParallel));
    }
    for (const uint32_t depth : depths_) {
      if (depth > 100) return absl::InvalidArgumentError(absl::StrCat("--depth ", depth, " is above 100"));
    }
    RWKV_RETURN_IF_ERROR(CheckDistinct("length", lengths_));
    RWKV_RETURN_IF_ERROR(CheckDistinct("depth", depths_));
    if (!lengths_.empty()) needle_.lengths = lengths_;
    if (!depths_.empty()) needle_.depths = depths_;
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    std::string text;
    const std::string& path = what_ == "needle" ? haystack_path_ : path_;
    if (!path.empty()) {
      RWKV_ASSIGN_OR_RETURN(text, path == "-" ? ReadAll(context.in) : ReadFile(path));
      if (text.empty()) {
        return absl::InvalidArgumentError(absl::StrCat(path == "-" ? "standard input" : path, " is empty"));
      }
    }
    absl::StatusOr<std::string> report = [&] {
      ProgressBar progress(context.err_is_terminal ? &context.err : nullptr, what_);
      return Measure({*context.client, initial_state_}, std::move(text), progress);
    }();
    if (!report.ok()) return report.status();
    context.out << *report;
    return absl::OkStatus();
  }

 private:
  static constexpr uint32_t kMaxParallel = 256;  // As many calls as a router lets wait by default.

  // A flag that was given, and the measures that it means something to.
  struct Given {
    std::string name;
    std::vector<std::string> measures;
  };

  void AddNumber(FlagSet& flags, const std::string& name, std::vector<std::string> measures, absl::string_view help,
                 std::function<void(uint32_t)> set) {
    flags.AddUint32(name, absl::StrCat(absl::StrJoin(measures, ", "), ": ", help),
                    [this, name, measures, set](uint32_t value) {
                      given_.push_back({name, measures});
                      set(value);
                    });
  }

  // kInvalidArgument: a value is there twice.
  static absl::Status CheckDistinct(absl::string_view name, const std::vector<uint32_t>& values) {
    for (size_t i = 1; i < values.size(); ++i) {
      if (std::find(values.begin(), values.begin() + i, values[i]) == values.begin() + i) continue;
      return absl::InvalidArgumentError(absl::StrCat("--", name, " ", values[i], " is given twice"));
    }
    return absl::OkStatus();
  }

  // The report as it is printed.
  absl::StatusOr<std::string> Measure(const EvalModel& model, std::string text, ProgressBar& progress) {
    if (what_ == "perplexity") {
      absl::StatusOr<PerplexityResult> result = EvaluatePerplexity(model, text, progress);
      if (!result.ok()) return result.status();
      return json_ ? DumpLine(PerplexityToJson(*result)) : PerplexityToTable(*result);
    }
    if (what_ == "lambada") {
      absl::StatusOr<std::vector<LambadaExample>> examples = ParseLambada(text);
      if (!examples.ok()) {
        return absl::InvalidArgumentError(absl::StrCat(path_, ": ", examples.status().message()));
      }
      absl::StatusOr<LambadaResult> result = EvaluateLambada(model, *examples, parallel_, progress);
      if (!result.ok()) return result.status();
      return json_ ? DumpLine(LambadaToJson(*result)) : LambadaToTable(*result);
    }
    if (what_ == "context") {
      absl::StatusOr<ContextResult> result = EvaluateContext(model, text, context_, progress);
      if (!result.ok()) return result.status();
      return json_ ? DumpLine(ContextToJson(*result)) : ContextToTable(*result);
    }
    needle_.haystack = std::move(text);
    absl::StatusOr<std::vector<NeedleCell>> cells = EvaluateNeedle(model, needle_, parallel_, progress);
    if (!cells.ok()) return cells.status();
    return json_ ? DumpLine(NeedleToJson(*cells)) : NeedleToTable(*cells);
  }

  std::string what_;
  std::string path_;
  std::string haystack_path_;
  std::string initial_state_;
  std::vector<uint32_t> lengths_;
  std::vector<uint32_t> depths_;
  ContextOptions context_;
  NeedleOptions needle_;
  uint32_t parallel_ = 16;
  std::vector<Given> given_;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeEvalCommand() { return std::make_unique<EvalCommand>(); }

}  // namespace rwkv::rwkvctl
