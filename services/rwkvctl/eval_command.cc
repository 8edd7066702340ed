#include "services/rwkvctl/eval_command.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "services/rwkvctl/eval_context.h"
#include "services/rwkvctl/eval_lambada.h"
#include "services/rwkvctl/eval_needle.h"
#include "services/rwkvctl/eval_perplexity.h"
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
    return "perplexity  FILE is fed as one document after id 0: nats per token, bits per byte. The router's limit is\n"
           "            --max_document_bytes.\n"
           "lambada     FILE has a {\"text\": \"...\"} a line; the last word is right if each of its tokens is the "
           "argmax.\n"
           "context     Loss by position, over windows of FILE that each begin with a fresh state.\n"
           "needle      A pass key in a long text, asked for at its end: accuracy by length and depth.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddBool("json", "one JSON object", &json_);
    flags.AddUint32("window-tokens", "context: length of a window (default 8192)",
                    [this](uint32_t value) { context_.tokens = value; });
    flags.AddUint32("windows", "context: at most so many (default 32)",
                    [this](uint32_t value) { context_.windows = value; });
    flags.AddUint32("length", "needle: tokens of the whole text; may be given often (default 256 512 1024 2048)",
                    [this](uint32_t value) { lengths_.push_back(value); });
    flags.AddUint32("depth", "needle: where the key stands, in percent; may be given often (default 0 25 50 75 100)",
                    [this](uint32_t value) { depths_.push_back(value); });
    flags.AddUint32("trials", "needle: keys per length and depth (default 3)",
                    [this](uint32_t value) { needle_.trials = value; });
    flags.AddString("haystack", "FILE", "needle: the text of no interest (default: a few plain sentences)",
                    [this](const std::string& value) {
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
      return absl::InvalidArgumentError(absl::StrCat("unknown measure \"", what_, "\""));
    } else if (positional.size() != 2) {
      return absl::InvalidArgumentError(absl::StrCat(what_, " takes one FILE"));
    } else {
      path_ = positional[1];
    }
    if (context_.tokens == 0 || context_.windows == 0 || needle_.trials == 0) {
      return absl::InvalidArgumentError("--window-tokens, --windows and --trials have to be positive");
    }
    for (const uint32_t depth : depths_) {
      if (depth > 100) return absl::InvalidArgumentError(absl::StrCat("--depth ", depth, " is above 100"));
    }
    if (!lengths_.empty()) needle_.lengths = lengths_;
    if (!depths_.empty()) needle_.depths = depths_;
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    std::string text;
    const std::string& path = what_ == "needle" ? haystack_path_ : path_;
    if (!path.empty()) {
      absl::StatusOr<std::string> content = ReadFile(path);
      if (!content.ok()) return content.status();
      if (content->empty()) return absl::InvalidArgumentError(absl::StrCat(path, " is empty"));
      text = *std::move(content);
    }
    absl::StatusOr<std::string> report = [&] {
      ProgressBar progress(context.err_is_terminal ? &context.err : nullptr, what_);
      return Measure(*context.client, std::move(text), progress);
    }();
    if (!report.ok()) return report.status();
    context.out << *report;
    return absl::OkStatus();
  }

 private:
  // The report as it is printed.
  absl::StatusOr<std::string> Measure(router::RouterClient& client, std::string text, ProgressBar& progress) {
    if (what_ == "perplexity") {
      absl::StatusOr<PerplexityResult> result = EvaluatePerplexity(client, text, progress);
      if (!result.ok()) return result.status();
      return json_ ? DumpLine(PerplexityToJson(*result)) : PerplexityToTable(*result);
    }
    if (what_ == "lambada") {
      absl::StatusOr<std::vector<LambadaExample>> examples = ParseLambada(text);
      if (!examples.ok()) {
        return absl::InvalidArgumentError(absl::StrCat(path_, ": ", examples.status().message()));
      }
      absl::StatusOr<LambadaResult> result = EvaluateLambada(client, *examples, progress);
      if (!result.ok()) return result.status();
      return json_ ? DumpLine(LambadaToJson(*result)) : LambadaToTable(*result);
    }
    if (what_ == "context") {
      absl::StatusOr<ContextResult> result = EvaluateContext(client, text, context_, progress);
      if (!result.ok()) return result.status();
      return json_ ? DumpLine(ContextToJson(*result)) : ContextToTable(*result);
    }
    needle_.haystack = std::move(text);
    absl::StatusOr<std::vector<NeedleCell>> cells = EvaluateNeedle(client, needle_, progress);
    if (!cells.ok()) return cells.status();
    return json_ ? DumpLine(NeedleToJson(*cells)) : NeedleToTable(*cells);
  }

  std::string what_;
  std::string path_;
  std::string haystack_path_;
  std::vector<uint32_t> lengths_;
  std::vector<uint32_t> depths_;
  ContextOptions context_;
  NeedleOptions needle_;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeEvalCommand() { return std::make_unique<EvalCommand>(); }

}  // namespace rwkv::rwkvctl
