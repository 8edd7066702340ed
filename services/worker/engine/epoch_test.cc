#include "services/worker/engine/epoch.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::worker {
namespace {

using ::testing::ElementsAre;

class Sink final : public EpochSink {
 public:
  void Send(v1::ExecuteResponse) override {}
  void OnRoom() override { ++rooms; }
  void End(const absl::Status& why) override { ends.push_back(std::string(why.message())); }

  int rooms = 0;
  std::vector<std::string> ends;
};

class EpochTest : public ::testing::Test {
 protected:
  bool Push() {
    v1::ExecuteRequest command;
    command.mutable_release();
    return epoch_.TryPush(command);
  }

  const std::shared_ptr<Sink> sink_ = std::make_shared<Sink>();
  Epoch epoch_{v1::OpenEpoch(), sink_, nullptr, nullptr, nullptr};
};

TEST_F(EpochTest, EndsOnceForTheFirstReason) {
  EXPECT_FALSE(epoch_.ended());
  EXPECT_FALSE(epoch_.WaitUntilEnded(absl::Now()));
  epoch_.End(absl::UnavailableError("first"));
  epoch_.End(absl::InternalError("second"));
  EXPECT_TRUE(epoch_.ended());
  EXPECT_TRUE(epoch_.WaitUntilEnded(absl::InfiniteFuture()));
  EXPECT_THAT(sink_->ends, ElementsAre("first"));
}

TEST_F(EpochTest, TakesSoManyCommandsAndAfterItsEndAny) {
  for (size_t i = 0; i < Epoch::kMaxCommands; ++i) ASSERT_TRUE(Push()) << i;
  EXPECT_FALSE(Push());
  epoch_.End(absl::UnavailableError("over"));
  for (size_t i = 0; i < 2 * Epoch::kMaxCommands; ++i) ASSERT_TRUE(Push()) << "it is dropped";
}

TEST_F(EpochTest, WhoWaitsForTheEndIsWoken) {
  std::thread ends([this] { epoch_.End(absl::UnavailableError("over")); });
  EXPECT_TRUE(epoch_.WaitUntilEnded(absl::Now() + absl::Minutes(1)));
  ends.join();
}

}  // namespace
}  // namespace rwkv::worker
