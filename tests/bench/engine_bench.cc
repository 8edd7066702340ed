// engine_bench MODEL DEVICE THREADS SECONDS BATCHES LENGTHS [POSITIONS]: the worker's engine alone, one stage, no RPC.
// A JSON line a case:
//   {"case": "decode", "batch": B, "threads": N, "tokens_per_s": {"best": X, "median": X}, ...}  B sequences, greedy
//   {"case": "prefill", "length": T, ...}  T tokens of one sequence in one step, of the last one logits
//   {"case": "prefill", "length": T, "sequences": B, ...}  as many of B, in as few steps of kMostRows as it takes
//   {"case": "position", "position": P, ...}  decode of one sequence that has read P tokens
// BATCHES, LENGTHS and POSITIONS are numbers by commas, or "-"; a length may be "BxT". Each case runs for SECONDS, and
// three times at least; for 0 seconds once, with no step before it that does not count.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/testing/test_engine.h"

namespace rwkv {
namespace {

using worker::EnginePipeline;
using worker::StepOutput;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Times {
  double best = 0;
  double median = 0;
  size_t count = 0;
};

// Seconds of `step`.
absl::StatusOr<Times> Measure(double seconds, absl::FunctionRef<absl::Status()> step) {
  const bool once = seconds == 0;
  const size_t at_least = once ? 1 : 3;
  for (int i = 0; i < 2 && !once; ++i) RWKV_RETURN_IF_ERROR(step());
  std::vector<double> times;
  const double end = Now() + seconds;
  while (times.size() < at_least || Now() < end) {
    const double begin = Now();
    RWKV_RETURN_IF_ERROR(step());
    times.push_back(Now() - begin);
  }
  std::sort(times.begin(), times.end());
  return Times{times.front(), times[times.size() / 2], times.size()};
}

void Print(absl::string_view name, absl::string_view size, int threads, double tokens, const Times& times) {
  std::cout << absl::StrFormat(
                   "{\"case\": \"%s\", %s, \"threads\": %d, \"tokens_per_s\": {\"best\": %.6g, \"median\": "
                   "%.6g}, \"steps\": %d}",
                   name, size, threads, tokens / times.best, tokens / times.median, times.count)
            << std::endl;
}

absl::Status EntriesAreOk(const StepOutput& output) {
  for (const v1::EntryResult& entry : output.result.entries()) {
    if (entry.status().code() != 0) return absl::InternalError(entry.status().message());
  }
  return absl::OkStatus();
}

absl::Status Decode(EnginePipeline& pipeline, int batch, int threads, double seconds) {
  for (int s = 0; s < batch; ++s) RWKV_RETURN_IF_ERROR(pipeline.AttachFresh(s, s + 1));
  std::vector<uint32_t> next(batch);
  for (int s = 0; s < batch; ++s) next[s] = 1 + s % 100;
  uint64_t position = 0;
  RWKV_ASSIGN_OR_RETURN(const Times times, Measure(seconds, [&] {
                          v1::Step step;
                          for (int s = 0; s < batch; ++s) {
                            *step.add_entries() = worker::Entry(s, s + 1, position, {next[s]}, false, true);
                          }
                          ++position;
                          RWKV_ASSIGN_OR_RETURN(const StepOutput output, pipeline.Step(std::move(step)));
                          for (int s = 0; s < batch; ++s) next[s] = output.result.entries(s).token_id();
                          return EntriesAreOk(output);
                        }));
  Print("decode", absl::StrCat("\"batch\": ", batch), threads, batch, times);
  return absl::OkStatus();
}

constexpr int kMostRows = 8192;  // Of a step.

struct Prompts {
  int sequences = 1;
  int length = 0;
  int TokensOfStep() const { return std::min(length, kMostRows / sequences); }  // Of each sequence.
};

absl::Status Prefill(EnginePipeline& pipeline, const Prompts& prompts, int threads, double seconds) {
  const int sequences = prompts.sequences;
  for (int s = 0; s < sequences; ++s) RWKV_RETURN_IF_ERROR(pipeline.AttachFresh(s, s + 1));
  uint64_t position = 0;
  RWKV_ASSIGN_OR_RETURN(const Times times, Measure(seconds, [&]() -> absl::Status {
                          for (int left = prompts.length; left > 0;) {
                            const int count = std::min(left, prompts.TokensOfStep());
                            left -= count;
                            std::vector<uint32_t> tokens(count);
                            for (int t = 0; t < count; ++t) tokens[t] = 1 + (position + t) * 7 % 100;
                            v1::Step step;
                            for (int s = 0; s < sequences; ++s) {
                              *step.add_entries() = worker::Entry(s, s + 1, position, tokens, false, left == 0);
                            }
                            position += count;
                            RWKV_ASSIGN_OR_RETURN(const StepOutput output, pipeline.Step(std::move(step)));
                            RWKV_RETURN_IF_ERROR(EntriesAreOk(output));
                          }
                          return absl::OkStatus();
                        }));
  std::string size = absl::StrCat("\"length\": ", prompts.length);
  if (sequences > 1) absl::StrAppend(&size, ", \"sequences\": ", sequences);
  Print("prefill", size, threads, static_cast<double>(sequences) * prompts.length, times);
  return absl::OkStatus();
}

constexpr int kChunk = 512;  // Tokens that a sequence reads at once on its way.

// One sequence, which reads on to each position in turn.
absl::Status Positions(EnginePipeline& pipeline, const std::vector<int>& positions, int threads, double seconds) {
  RWKV_RETURN_IF_ERROR(pipeline.AttachFresh(0, 1));
  uint64_t position = 0;
  const auto read = [&](int count) -> absl::Status {
    std::vector<uint32_t> tokens(count);
    for (int t = 0; t < count; ++t) tokens[t] = 1 + (position + t) * 7 % 100;
    v1::Step step;
    *step.add_entries() = worker::Entry(0, 1, position, tokens, false, true);
    position += count;
    RWKV_ASSIGN_OR_RETURN(const StepOutput output, pipeline.Step(std::move(step)));
    return EntriesAreOk(output);
  };
  for (const uint64_t until : positions) {
    while (position < until) RWKV_RETURN_IF_ERROR(read(static_cast<int>(std::min<uint64_t>(kChunk, until - position))));
    RWKV_ASSIGN_OR_RETURN(const Times times, Measure(seconds, [&] { return read(1); }));
    Print("position", absl::StrCat("\"position\": ", until), threads, 1, times);
  }
  return absl::OkStatus();
}

constexpr int kMostTokens = 10000000;

// False: a number is missing, or not in 1 .. most.
bool ParseSize(absl::string_view text, int most, int* size) {
  return absl::SimpleAtoi(text, size) && *size >= 1 && *size <= most;
}

bool ParseSizes(absl::string_view text, int most, std::vector<int>* sizes) {
  if (text == "-") return true;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    if (!ParseSize(part, most, &sizes->emplace_back())) return false;
  }
  return true;
}

bool ParseLengths(absl::string_view text, std::vector<Prompts>* lengths) {
  if (text == "-") return true;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> sizes = absl::StrSplit(part, 'x');
    Prompts& prompts = lengths->emplace_back();
    if (sizes.size() > 2 || !ParseSize(sizes.back(), kMostRows, &prompts.length)) return false;
    if (sizes.size() == 2 && !ParseSize(sizes.front(), kMostRows, &prompts.sequences)) return false;
  }
  return true;
}

int Main(int argc, char** argv) {
  std::vector<int> batches, positions;
  std::vector<Prompts> lengths;
  worker::TestEngineOptions options;
  double seconds = 0;
  if (argc < 7 || argc > 8 || !absl::SimpleAtoi(argv[3], &options.threads) || !absl::SimpleAtod(argv[4], &seconds) ||
      !ParseSizes(argv[5], kMostRows, &batches) || !ParseLengths(argv[6], &lengths) ||
      (argc == 8 && !ParseSizes(argv[7], kMostTokens, &positions))) {
    std::cerr << "usage: engine_bench MODEL DEVICE THREADS SECONDS BATCHES LENGTHS [POSITIONS]" << std::endl;
    return 2;
  }
  options.device = argv[2];
  options.slots = 1;
  for (const int batch : batches) options.slots = std::max(options.slots, batch);
  options.max_batch_tokens = options.slots;
  for (const Prompts& prompts : lengths) {
    options.slots = std::max(options.slots, prompts.sequences);
    options.max_batch_tokens = std::max(options.max_batch_tokens, prompts.sequences * prompts.TokensOfStep());
  }
  if (!positions.empty()) options.max_batch_tokens = std::max(options.max_batch_tokens, kChunk);
  std::sort(positions.begin(), positions.end());
  EnginePipeline pipeline(argv[1], 1, options);
  absl::Status status;
  for (const int batch : batches) status.Update(Decode(pipeline, batch, options.threads, seconds));
  for (const Prompts& prompts : lengths) status.Update(Prefill(pipeline, prompts, options.threads, seconds));
  if (!positions.empty()) status.Update(Positions(pipeline, positions, options.threads, seconds));
  if (!status.ok()) std::cerr << "engine_bench: " << status << std::endl;
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace rwkv

int main(int argc, char** argv) { return rwkv::Main(argc, argv); }
