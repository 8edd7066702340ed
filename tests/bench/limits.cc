// limits BYTES THREADS REPEATS: how fast this machine reads so many bytes again and again, all threads together. Prints
// {"bytes": N, "threads": N, "read_gb_per_s": {"best": X, "median": X}}.
//
// One-row decoding reads every weight once a token, so its limit is this rate at the model's own size: what fits into a
// cache is read faster than what does not. Each thread walks its share as eight streams, which memory delivers fastest.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kPage = int64_t{2} << 20;
constexpr int kStreams = 8;
constexpr int64_t kLine = 64;

uint64_t Load(const char* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

// Every byte of [data, data + bytes), where bytes is a multiple of kStreams * kLine.
uint64_t ReadAll(const char* data, int64_t bytes) {
  const int64_t share = bytes / kStreams;
  uint64_t sums[kLine / 8] = {};
  for (int64_t i = 0; i < share; i += kLine) {
    for (int s = 0; s < kStreams; ++s) {
      const char* const line = data + s * share + i;
      __builtin_prefetch(line + 8 * kLine);
      for (int64_t w = 0; w < kLine / 8; ++w) sums[w] += Load(line + 8 * w);
    }
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

// All threads leave together.
class Gate {
 public:
  explicit Gate(int threads) : threads_(threads) {}
  void Pass() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_ = 0;
      ++round_;
      return;
    }
    while (round_.load() == round) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::atomic<uint64_t> g_sum{0};  // So that nothing is optimised away.

}  // namespace

int main(int argc, char** argv) {
  const int64_t bytes = argc == 4 ? std::atoll(argv[1]) : 0;
  const int threads = argc == 4 ? std::atoi(argv[2]) : 0;
  const int repeats = argc == 4 ? std::atoi(argv[3]) : 0;
  const int64_t share = threads < 1 ? 0 : bytes / threads / (kStreams * kLine) * (kStreams * kLine);
  if (share < 1 || threads > 1024 || repeats < 1) {
    std::fprintf(stderr, "usage: limits BYTES THREADS REPEATS\n");
    return 2;
  }
  const int64_t mapped = (share * threads / kPage + 2) * kPage;
  void* const memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("limits: mmap");
    return 1;
  }
  char* const data = static_cast<char*>(memory) + (kPage - reinterpret_cast<uintptr_t>(memory) % kPage) % kPage;
  madvise(data, mapped - kPage, MADV_HUGEPAGE);  // As files are mapped; without them it is a few percent slower.

  Gate gate(threads);
  std::vector<std::vector<double>> begins(threads), ends(threads);
  const auto work = [&](int thread) {
    char* const mine = data + thread * share;
    std::memset(mine, thread + 1, share);
    uint64_t sum = ReadAll(mine, share);
    for (int r = 0; r < repeats; ++r) {
      gate.Pass();
      begins[thread].push_back(Now());
      sum += ReadAll(mine, share);
      ends[thread].push_back(Now());
    }
    g_sum += sum;
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();

  std::vector<double> rates;
  for (int r = 0; r < repeats; ++r) {
    double begin = begins[0][r], end = ends[0][r];
    for (int t = 1; t < threads; ++t) {
      begin = std::min(begin, begins[t][r]);
      end = std::max(end, ends[t][r]);
    }
    rates.push_back(static_cast<double>(share) * threads / (end - begin) * 1e-9);
  }
  std::sort(rates.begin(), rates.end());
  std::printf("{\"bytes\": %lld, \"threads\": %d, \"read_gb_per_s\": {\"best\": %.3f, \"median\": %.3f}}\n",
              static_cast<long long>(share * threads), threads, rates.back(), rates[rates.size() / 2]);
  return 0;
}
