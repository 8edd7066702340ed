// A step on a stage that makes no answers allocates nothing, once it has seen one as large.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/small_model.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace {
std::atomic<int64_t> allocations{0};
}  // namespace

void* operator new(size_t bytes) {
  ++allocations;
  void* const memory = std::malloc(bytes);
  if (memory == nullptr) std::abort();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace rwkv::worker {
namespace {

TEST(StepAllocationTest, EnqueueAndFinishAllocateNothing) {
  const std::string path = WriteSmallModel();
  for (const int stage : {0, 1}) {
    SCOPED_TRACE(stage);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<StageEngine> engine, MakeTestEngine(path, stage, 3, {}));
    v1::AttachSequence attach;
    attach.set_fresh(true);
    for (int slot : {0, 1}) {
      attach.set_slot(slot);
      attach.set_sequence(slot + 1);
      ASSERT_OK(engine->Attach(attach));
    }
    // The commands are the router's, made before.
    std::vector<v1::Step> steps;
    for (uint64_t i = 0; i < 6; ++i) {
      v1::Step& step = steps.emplace_back();
      step.set_step_id(i + 1);
      *step.add_entries() = Entry(0, 1, 2 * i, {1, 2}, false, true);
      *step.add_entries() = Entry(1, 2, i, {3}, false, true);
    }
    int64_t before = 0;
    for (v1::Step& step : steps) {
      if (step.step_id() == 4) before = allocations;  // Both places have seen one.
      LinkFrame* const input = stage == 0 ? nullptr : &engine->input_frame();
      if (input != nullptr) {
        input->header.step_id = step.step_id();
        input->header.rows = 3;
      }
      // Matchers would allocate.
      ASSERT_TRUE(engine->Enqueue(std::move(step), input).ok());
      ASSERT_TRUE(engine->Finish().ok());
    }
    EXPECT_EQ(allocations - before, 0);
  }
}

}  // namespace
}  // namespace rwkv::worker
