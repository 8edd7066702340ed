#include "services/rwkvctl/eval_needle.h"

#include <random>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/common/parallel.h"
#include "services/rwkvctl/eval_tokens.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

// The pass key test of arXiv:2305.16300 (Landmark Attention), appendix: task, filler, key, question.
constexpr char kTask[] =
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n";
constexpr char kFiller[] = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
constexpr char kKey[] = "\nThe pass key is %d. Remember it. %d is the pass key.\n";
constexpr char kQuestion[] = "\nWhat is the pass key? The pass key is";
constexpr uint32_t kAnswerTokens = 8;  // A key has five digits, each a token at worst, after a blank.

void Append(const TokenIds& more, TokenIds& tokens) { tokens.insert(tokens.end(), more.begin(), more.end()); }

// What every text of a run is made of.
struct Parts {
  TokenIds task;  // After id 0.
  TokenIds filler;
  TokenIds question;
};

absl::StatusOr<Parts> EncodeParts(const EvalModel& model, const std::string& haystack) {
  Parts parts;
  absl::StatusOr<TokenIds> task = EncodeText(model, kTask);
  if (!task.ok()) return task.status();
  parts.task = *std::move(task);
  parts.task.insert(parts.task.begin(), 0);
  absl::StatusOr<TokenIds> filler = EncodeDocument(model, haystack.empty() ? kFiller : haystack);
  if (!filler.ok()) return filler.status();
  parts.filler = *std::move(filler);
  absl::StatusOr<TokenIds> question = EncodeText(model, kQuestion);
  if (!question.ok()) return question.status();
  parts.question = *std::move(question);
  return parts;
}

// Whether the model finds `key`, which stands at `depth` percent of a text of `length` tokens.
absl::StatusOr<bool> FindsKey(const EvalModel& model, const Parts& parts, uint32_t length, uint32_t depth, int key) {
  absl::StatusOr<TokenIds> needle = EncodeText(model, absl::StrFormat(kKey, key, key));
  if (!needle.ok()) return needle.status();
  const size_t fixed = parts.task.size() + needle->size() + parts.question.size();
  if (length < fixed) {
    return absl::InvalidArgumentError(
        absl::StrCat("length ", length, ": task, key and question alone have ", fixed, " tokens"));
  }
  const size_t filling = length - fixed;
  const size_t before = filling * depth / 100;
  TokenIds tokens = parts.task;
  for (size_t i = 0; i < filling; ++i) {
    if (i == before) Append(*needle, tokens);
    tokens.push_back(parts.filler[i % parts.filler.size()]);
  }
  if (before == filling) Append(*needle, tokens);
  Append(parts.question, tokens);
  absl::StatusOr<std::vector<v1::GenerateResponse>> answer = ContinueGreedily(model, tokens, kAnswerTokens);
  if (!answer.ok()) return answer.status();
  std::string text;
  for (const v1::GenerateResponse& token : *answer) text += token.text();
  return absl::StartsWith(absl::StripLeadingAsciiWhitespace(text), absl::StrCat(key));
}

}  // namespace

absl::StatusOr<std::vector<NeedleCell>> EvaluateNeedle(const EvalModel& model, const NeedleOptions& options,
                                                       uint32_t parallel, ProgressBar& progress) {
  absl::StatusOr<Parts> parts = EncodeParts(model, options.haystack);
  if (!parts.ok()) return parts.status();
  std::vector<NeedleCell> cells;
  for (const uint32_t length : options.lengths) {
    for (const uint32_t depth : options.depths) cells.push_back({length, depth, options.trials, 0});
  }
  std::mt19937 random(20230525);  // Seeded: runs can be compared.
  std::vector<int> keys(cells.size() * options.trials);
  for (int& key : keys) key = 10000 + static_cast<int>(random() % 90000);
  std::vector<char> found(keys.size());  // Not of bool, whose elements share bytes.
  absl::Status status = common::RunInParallel(
      keys.size(), parallel,
      [&](size_t i) {
        const NeedleCell& cell = cells[i / options.trials];
        absl::StatusOr<bool> finds = FindsKey(model, *parts, cell.length, cell.depth, keys[i]);
        if (finds.ok()) found[i] = static_cast<char>(*finds);
        return finds.status();
      },
      [&](size_t done) { progress.Update(done, keys.size()); });
  if (!status.ok()) return status;
  for (size_t i = 0; i < found.size(); ++i) cells[i / options.trials].correct += found[i];
  return cells;
}

Json NeedleToJson(const std::vector<NeedleCell>& cells) {
  Json list = Json::array();
  uint64_t trials = 0;
  uint64_t correct = 0;
  for (const NeedleCell& cell : cells) {
    list.push_back(
        {{"length", cell.length}, {"depth", cell.depth}, {"trials", cell.trials}, {"correct", cell.correct}});
    trials += cell.trials;
    correct += cell.correct;
  }
  return {{"cells", std::move(list)}, {"accuracy", static_cast<double>(correct) / static_cast<double>(trials)}};
}

std::string NeedleToTable(const std::vector<NeedleCell>& cells) {
  std::vector<std::vector<std::string>> rows = {{"LENGTH"}};
  for (const NeedleCell& cell : cells) {
    if (cell.length == cells[0].length && rows.size() <= 2) rows[0].push_back(absl::StrCat("DEPTH ", cell.depth, " %"));
    if (rows.size() == 1 || rows.back()[0] != absl::StrCat(cell.length)) rows.push_back({absl::StrCat(cell.length)});
    rows.back().push_back(absl::StrFormat("%.0f", 100.0 * cell.correct / cell.trials));
  }
  return absl::StrCat(FormatTable(rows), "\nAccuracy in percent, ", cells[0].trials, " trials each.\n");
}

}  // namespace rwkv::rwkvctl
