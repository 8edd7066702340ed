#include "services/rwkvctl/load/workload.h"

#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "services/rwkvctl/flag_set.h"

namespace rwkv::rwkvctl {
namespace {

constexpr uint64_t kLengthStreams = uint64_t{1} << 62;  // One a request from here on,
constexpr uint64_t kPromptStreams = uint64_t{1} << 63;  // and another from here on.

constexpr double kMaxOffsetSeconds = 1e9;
// More than a message to the router may hold; a slip of the pen should not take the machine's memory.
constexpr uint32_t kMaxTokens = 1 << 22;

absl::StatusOr<uint32_t> ParseLength(absl::string_view text, uint32_t min) {
  absl::StatusOr<uint64_t> value = ParseUint64(text, kMaxTokens);
  if (!value.ok()) return value.status();
  if (*value < min) return absl::InvalidArgumentError(absl::StrCat(*value, " is below ", min));
  return static_cast<uint32_t>(*value);
}

// A whole number of tokens, `min` or more.
absl::StatusOr<uint32_t> TokensOf(const nlohmann::json& line, const char* key, uint32_t min) {
  const auto it = line.find(key);
  if (it != line.end() && it->is_number_unsigned() && it->get<uint64_t>() >= min && it->get<uint64_t>() <= kMaxTokens) {
    return it->get<uint32_t>();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", key, "\" is missing, or no whole number in ", min, " .. ", kMaxTokens));
}

}  // namespace

absl::StatusOr<LengthRange> ParseLengthRange(absl::string_view text, uint32_t min) {
  const std::pair<absl::string_view, absl::string_view> ends = absl::StrSplit(text, absl::MaxSplits("..", 1));
  LengthRange range;
  absl::StatusOr<uint32_t> first = ParseLength(ends.first, min);
  if (!first.ok()) return first.status();
  range.first = range.last = *first;
  if (ends.first.size() == text.size()) return range;
  absl::StatusOr<uint32_t> last = ParseLength(ends.second, min);
  if (!last.ok()) return last.status();
  range.last = *last;
  if (range.last < range.first) return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" ends below its begin"));
  return range;
}

absl::StatusOr<Trace> ParseTrace(absl::string_view jsonl) {
  Trace trace;
  absl::flat_hash_map<std::string, size_t> conversations;
  int64_t number = 0;
  for (absl::string_view text : absl::StrSplit(jsonl, '\n')) {
    ++number;
    const auto wrong = [number](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat("line ", number, ": ", what));
    };
    text = absl::StripAsciiWhitespace(text);
    if (text.empty()) continue;
    const nlohmann::json line = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!line.is_object()) return wrong("no JSON object");
    TraceRequest request;
    const auto offset = line.find("offset");
    if (offset == line.end() || !offset->is_number() || !(offset->get<double>() >= 0) ||
        !(offset->get<double>() <= kMaxOffsetSeconds)) {
      return wrong("\"offset\" is missing, or no number of seconds from 0 on");
    }
    request.due = absl::Seconds(offset->get<double>());
    if (!trace.requests.empty() && request.due < trace.requests.back().due) {
      return wrong("its \"offset\" is before that of the line before");
    }
    absl::StatusOr<uint32_t> prompt_tokens = TokensOf(line, "prompt_tokens", 1);
    if (!prompt_tokens.ok()) return wrong(prompt_tokens.status().message());
    request.prompt_tokens = *prompt_tokens;
    absl::StatusOr<uint32_t> max_tokens = TokensOf(line, "max_tokens", 0);
    if (!max_tokens.ok()) return wrong(max_tokens.status().message());
    request.max_tokens = *max_tokens;
    if (const auto session = line.find("session"); session != line.end() && !session->is_null()) {
      if (!session->is_string() && !session->is_number_integer())
        return wrong("\"session\" is no string and no number");
      // "1" and 1 are two sessions, which hardly matters.
      request.conversation = conversations.try_emplace(session->dump(), conversations.size()).first->second;
    }
    trace.requests.push_back(request);
  }
  trace.conversations = conversations.size();
  if (trace.requests.empty()) return absl::InvalidArgumentError("there is no request in it");
  return trace;
}

Workload::Workload(WorkloadOptions options) : options_(std::move(options)) {
  if (!options_.arrivals.has_value()) return;
  ArrivalOptions arrivals = *options_.arrivals;
  arrivals.seed = options_.seed;
  arrivals_.emplace(arrivals);
}

absl::optional<PlannedRequest> Workload::Next() {
  if (options_.requests.has_value() && next_ >= *options_.requests) return absl::nullopt;
  PlannedRequest request;
  request.index = next_;
  if (options_.trace.has_value()) {
    if (next_ >= options_.trace->requests.size()) return absl::nullopt;
    const TraceRequest& line = options_.trace->requests[next_];
    request.due = line.due;
    request.prompt_tokens = line.prompt_tokens;
    request.max_tokens = line.max_tokens;
    request.conversation = line.conversation;
  } else {
    if (arrivals_.has_value()) request.due = arrivals_->Next();
    LoadRandom random(options_.seed, kLengthStreams + next_);
    request.prompt_tokens = random.Uniform(options_.prompt_tokens.first, options_.prompt_tokens.last);
    request.max_tokens = random.Uniform(options_.max_tokens.first, options_.max_tokens.last);
  }
  if (options_.duration.has_value() && request.due.has_value() && *request.due >= *options_.duration) {
    return absl::nullopt;
  }
  ++next_;
  return request;
}

std::vector<uint32_t> RandomPrompt(uint64_t seed, uint64_t index, uint32_t tokens, uint32_t vocab_size) {
  LoadRandom random(seed, kPromptStreams + index);
  std::vector<uint32_t> ids(tokens);
  for (uint32_t& id : ids) id = random.Uniform(1, vocab_size - 1);
  return ids;
}

}  // namespace rwkv::rwkvctl
