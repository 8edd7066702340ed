#include "services/worker/client/worker_client.h"

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "services/common/channel.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::StatusIs;

// Whoever hears of the last answer may take down channel and process while gRPC's thread is still at it.
TEST(WorkerClientTest, NothingOfAQuestionHoldsTheChannelOnceItIsAnswered) {
  const std::shared_ptr<grpc::Channel> channel = common::MakeChannel("127.0.0.1:1", {});  // Nobody is there.
  const std::unique_ptr<WorkerClient> client = MakeWorkerClient("127.0.0.1:1", channel);
  const long before = channel.use_count();  // NOLINT(google-runtime-int): as the standard library says it.
  absl::Notification answered;
  client->AskToDescribe({}, absl::Now() + absl::Seconds(30), [&](const absl::StatusOr<v1::DescribeResponse>& answer) {
    EXPECT_THAT(answer, StatusIs(absl::StatusCode::kUnavailable));
    EXPECT_EQ(channel.use_count(), before);
    answered.Notify();
  });
  answered.WaitForNotification();
}

}  // namespace
}  // namespace rwkv::worker
