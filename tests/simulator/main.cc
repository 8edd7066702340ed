// Runs seeds of the simulation, one after the other, until one fails or all are through: a soak, or a replay.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/simulator/simulation.h"

ABSL_FLAG(uint64_t, first_seed, 1, "The first seed.");
ABSL_FLAG(uint64_t, seeds, 10000, "How many.");
ABSL_FLAG(std::vector<std::string>, faults, {}, "Of the seed's faults only these, by number; none named: all.");
ABSL_FLAG(bool, looks_at_all, false, "Routers look at everything after every event; the digest is the same.");

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  rwkv::simulator::Options options;
  for (const std::string& fault : absl::GetFlag(FLAGS_faults)) {
    int number = 0;
    if (!absl::SimpleAtoi(fault, &number)) {
      std::fprintf(stderr, "--faults: '%s' is no number\n", fault.c_str());
      return 2;
    }
    options.all_faults = false;
    options.faults.push_back(number);
  }
  options.looks_at_all = absl::GetFlag(FLAGS_looks_at_all);
  const absl::Time begin = absl::Now();
  uint64_t events = 0, tokens = 0, digest = 0, longest_pause_of = 0;
  absl::Duration time, longest_pause;
  const uint64_t first = absl::GetFlag(FLAGS_first_seed);
  for (uint64_t seed = first; seed < first + absl::GetFlag(FLAGS_seeds); ++seed) {
    options.seed = seed;
    const rwkv::simulator::Result result = rwkv::simulator::Simulate(options);
    events += result.events;
    tokens += result.tokens;
    digest = digest * 0x100000001b3 + result.digest;
    time += result.time;
    if (result.longest_pause > longest_pause) {
      longest_pause = result.longest_pause;
      longest_pause_of = seed;
    }
    if (result.violation.empty()) continue;
    std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), result.violation.c_str());
    rwkv::simulator::Options needed = options;
    needed.all_faults = false;
    needed.faults = rwkv::simulator::Shrink(options);
    for (const int fault : needed.faults) {
      std::printf("  fault %d: %s\n", fault, result.faults[fault].ToString().c_str());
    }
    std::printf("  %s\n", rwkv::simulator::ReplayCommand(needed).c_str());
    return 1;
  }
  std::printf(
      "%llu seeds, %llu tokens, %s of virtual time in %llu events, %s of real time: no law was broken; the "
      "longest pause of a stream was %s (seed %llu); digest of it all %016llx\n",
      static_cast<unsigned long long>(absl::GetFlag(FLAGS_seeds)), static_cast<unsigned long long>(tokens),
      absl::FormatDuration(time).c_str(), static_cast<unsigned long long>(events),
      absl::FormatDuration(absl::Now() - begin).c_str(), absl::FormatDuration(longest_pause).c_str(),
      static_cast<unsigned long long>(longest_pause_of), static_cast<unsigned long long>(digest));
  return 0;
}
