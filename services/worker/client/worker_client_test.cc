#include "services/worker/client/worker_client.h"

#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "services/common/channel.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr absl::Duration kLimit = absl::Seconds(30);

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

// Answers an attach twice; a release ends the stream.
class TwiceService final : public v1::Worker::Service {
 public:
  TwiceService() {
    grpc::ServerBuilder builder;
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    client_ = MakeWorkerClient("w:1", server_->InProcessChannel({}));
  }
  std::unique_ptr<ExecuteStream> Execute() { return client_->Execute(); }

 private:
  grpc::Status Execute(grpc::ServerContext* context,
                       grpc::ServerReaderWriter<v1::ExecuteResponse, v1::ExecuteRequest>* stream) override {
    v1::ExecuteRequest request;
    while (stream->Read(&request)) {
      if (request.has_release()) return {grpc::StatusCode::UNAVAILABLE, "it drains"};
      v1::ExecuteResponse response;
      response.mutable_attached()->set_sequence(request.attach().sequence());
      stream->Write(response);
      stream->Write(response);
    }
    return grpc::Status::OK;
  }

  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<WorkerClient> client_;
};

absl::Status Attach(ExecuteStream& stream, uint64_t sequence) {
  v1::ExecuteRequest request;
  request.mutable_attach()->set_sequence(sequence);
  return stream.Write(request);
}

absl::Status Release(ExecuteStream& stream) {
  v1::ExecuteRequest request;
  request.mutable_release();
  return stream.Write(request);
}

// What somebody heard of a stream.
class Ear {
 public:
  ExecuteStream::Heard heard() {
    return [this](const absl::StatusOr<v1::ExecuteResponse>& response) {
      absl::MutexLock lock(&mu_);
      EXPECT_TRUE(end_.ok()) << "after the end";
      if (response.ok()) sequences_.push_back(response->attached().sequence());
      if (!response.ok()) end_ = response.status();
    };
  }
  std::vector<uint64_t> Wait(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto come = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return sequences_.size() >= count; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&come), kLimit));
    return sequences_;
  }
  absl::Status WaitEnd() {
    absl::MutexLock lock(&mu_);
    const auto over = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !end_.ok(); };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&over), kLimit));
    return end_;
  }

 private:
  absl::Mutex mu_;
  std::vector<uint64_t> sequences_ ABSL_GUARDED_BY(mu_);
  absl::Status end_ ABSL_GUARDED_BY(mu_);
};

TEST(ExecuteStreamTest, WhoListensHearsAllInOrderAndThenWhyItEnded) {
  TwiceService service;
  Ear ear;
  const std::unique_ptr<ExecuteStream> stream = service.Execute();
  stream->Listen(ear.heard());
  for (uint64_t sequence = 1; sequence <= 50; ++sequence) ASSERT_THAT(Attach(*stream, sequence), IsOk());
  ASSERT_THAT(Release(*stream), IsOk());
  EXPECT_THAT(ear.WaitEnd(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("worker w:1: it drains")));
  const std::vector<uint64_t> heard = ear.Wait(100);
  ASSERT_EQ(heard.size(), 100u);
  for (size_t i = 0; i < heard.size(); ++i) EXPECT_EQ(heard[i], 1 + i / 2);
  EXPECT_THAT(Attach(*stream, 51), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is over")));
}

TEST(ExecuteStreamTest, WhoReadsIsToldTheEndAgainAndAgain) {
  TwiceService service;
  const std::unique_ptr<ExecuteStream> stream = service.Execute();
  ASSERT_THAT(Attach(*stream, 7), IsOk());
  for (int i = 0; i < 2; ++i) {
    const absl::StatusOr<v1::ExecuteResponse> response = stream->Read();
    ASSERT_THAT(response.status(), IsOk());
    EXPECT_EQ(response->attached().sequence(), 7u);
  }
  ASSERT_THAT(Release(*stream), IsOk());
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(stream->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("it drains")));
  }
}

TEST(ExecuteStreamTest, CancelIsHeard) {
  TwiceService service;
  Ear ear;
  const std::unique_ptr<ExecuteStream> stream = service.Execute();
  stream->Listen(ear.heard());
  ASSERT_THAT(Attach(*stream, 1), IsOk());
  ear.Wait(2);
  stream->Cancel();
  stream->Cancel();
  EXPECT_THAT(ear.WaitEnd(), StatusIs(absl::StatusCode::kCancelled));
}

TEST(ExecuteStreamTest, ItIsDestroyedWhetherOrNotAnybodyListened) {
  TwiceService service;
  service.Execute();
  const std::unique_ptr<ExecuteStream> written = service.Execute();
  ASSERT_THAT(Attach(*written, 1), IsOk());
}

TEST(ExecuteStreamTest, WhoDestroysItWaitsForWhoeverListens) {
  TwiceService service;
  absl::Notification inside;
  absl::Notification go_on;
  absl::Status end;
  std::unique_ptr<ExecuteStream> stream = service.Execute();
  stream->Listen([&](const absl::StatusOr<v1::ExecuteResponse>& response) {
    if (!response.ok()) {
      end = response.status();
    } else if (!inside.HasBeenNotified()) {
      inside.Notify();
      go_on.WaitForNotification();
    }
  });
  ASSERT_THAT(Attach(*stream, 1), IsOk());
  inside.WaitForNotification();
  std::thread destroyer([&] {
    stream = nullptr;
    EXPECT_TRUE(go_on.HasBeenNotified());
    EXPECT_THAT(end, StatusIs(absl::StatusCode::kCancelled)) << "all was heard";
  });
  go_on.Notify();
  destroyer.join();
}

}  // namespace
}  // namespace rwkv::worker
