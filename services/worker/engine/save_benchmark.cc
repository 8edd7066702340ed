// What a save costs the thread that runs the steps, at the state of a 1.5B model (24 layers of 544 KB): a step alone,
// and a step with a save behind it, whose copy another thread checks. The model's matrices are small, so that the share
// of the saves is the largest there is.
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "benchmark/benchmark.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/state_copy.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"

namespace rwkv::worker {
namespace {

constexpr size_t kMaxSaves = 4;  // Under way.

std::unique_ptr<StageEngine> MakeEngine() {
  rwkv::testing::RandomModelOptions model;
  model.layers = 24;
  model.width = 512;
  model.head_size = 256;  // As many floats as 32 heads of 64.
  model.ffn_width = 512;
  model.vocab_size = 64;
  const char* const folder = std::getenv("TEST_TMPDIR");
  const std::string path = std::string(folder == nullptr ? "/tmp" : folder) + "/save_benchmark.safetensors";
  if (!rwkv::testing::WriteRandomModel(model, path).ok()) std::abort();
  return *MakeTestEngine(path, 0, 1, {});
}

// A saver thread, without a store.
class Saver {
 public:
  ~Saver() {
    {
      const std::lock_guard<std::mutex> lock(mu_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void Push(std::shared_ptr<StateCopy> copy) {
    const std::lock_guard<std::mutex> lock(mu_);
    if (saves_.size() >= kMaxSaves) return;  // Dropped, as beyond the bound of the real one.
    saves_.push_back(std::move(copy));
    changed_.notify_all();
  }

 private:
  void Loop() {
    for (;;) {
      std::shared_ptr<StateCopy> copy;
      {
        std::unique_lock<std::mutex> lock(mu_);
        changed_.wait(lock, [this] { return stopping_ || !saves_.empty(); });
        if (stopping_) return;
        copy = std::move(saves_.front());
        saves_.pop_front();
      }
      benchmark::DoNotOptimize(copy->Records(0));
    }
  }

  std::mutex mu_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::deque<std::shared_ptr<StateCopy>> saves_;
  std::thread thread_{[this] { Loop(); }};
};

void Step(benchmark::State& state, bool save_each) {
  const std::unique_ptr<StageEngine> engine = MakeEngine();
  v1::AttachSequence attach;
  attach.set_sequence(1);
  attach.set_fresh(true);
  if (!engine->Attach(attach).ok()) std::abort();
  Saver saver;
  uint64_t position = 0;
  for (auto _ : state) {
    v1::Step step;
    step.set_step_id(position + 1);
    *step.add_entries() = Entry(0, 1, position++, {3}, false);
    if (!engine->Enqueue(std::move(step), nullptr).ok() || !engine->Finish().ok()) std::abort();
    if (!save_each) continue;
    v1::SaveSnapshot save;
    save.set_sequence(1);
    save.set_expected_position(position);
    saver.Push(*engine->CopyState(save));
  }
  state.counters["state_bytes"] = static_cast<double>(engine->copies().bytes());
}

void StepAlone(benchmark::State& state) { Step(state, false); }
void StepAndSave(benchmark::State& state) { Step(state, true); }

BENCHMARK(StepAlone)->Unit(benchmark::kMicrosecond);
BENCHMARK(StepAndSave)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace rwkv::worker

BENCHMARK_MAIN();
